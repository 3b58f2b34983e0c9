"""Goodput over rate: ``benchmark.py`` at one rate after another, then a report of all of them.

    python -m load_tests.rates --host http://127.0.0.1:8000 --rates 1,2,4,8 --out runs/rates

Options that it does not know are ``benchmark.py``'s; ``-t`` is of each run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from load_tests.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the benchmark at several rates.")
    parser.add_argument("--rates", default="1,2,4,8", help="requests/s, commas")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and report")
    chosen, options = parser.parse_known_args()
    file = Path(__file__).with_name("benchmark.py")
    command = [sys.executable, "-m", "locust", "-f", str(file), "--headless", "--skip-log-setup"]
    command += ["-u", "1", "-t", "30s", *options]
    for rate in chosen.rates.split(","):
        out = chosen.out / f"rate-{rate}"
        print(f"\n{rate} requests/s", flush=True)
        code = subprocess.call([*command, "--rate", rate, "--out", str(out)])
        if not (out / "summary.json").exists():
            return code or 1
    print(write_report([chosen.out]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
