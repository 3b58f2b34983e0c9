"""What a pattern of attention is worth through the whole stack: full, sliding, chunked, sinks.

    python -m benchmarks.attention_kinds                 # one GPU, Qwen3-0.6B's shape, 8k to 127k
    python -m benchmarks.attention_kinds --device cpu    # the demo model, 512 to 4k

Serves the same engine under each pattern in turn, behind the gateway, and sends each the same sweep
over prompt lengths, one request at a time, then a crowd of prompts at once. A local query sees the
same number of keys in every pattern. Prints a Markdown table and leaves the runs, a report with the
figures (``report.html``) and the configurations in ``--out``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import loads, shape
from benchmarks.session import Session, System
from load_tests.report import FinishedRun, read_run, write_report
from load_tests.summary import figure, percentile

CONFIGS = Path(__file__).resolve().parent / "configs"
_HELD = re.compile(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")


@dataclass(frozen=True, slots=True)
class Scale:
    """What a device has time for; lengths in tokens."""

    lengths: str
    visible: int  # keys that a local query sees
    sinks: int
    output: int
    repeats: int
    crowd: int  # requests at once
    crowd_length: str


SCALES = {
    "gpu": Scale("8k,16k,32k,64k,127k", 2048, 64, 128, 3, 64, "32k"),
    "cpu": Scale("512,2k,4k", 512, 32, 48, 2, 4, "2k"),  # 48 bytes hold the demo model's answer
}


def patterns(scale: Scale) -> dict[str, dict[str, int]]:
    """The ``local_attention`` of each kind; chunked keeps every fourth layer full (3:1)."""
    return {
        "full": {},
        "sliding": {"sliding_window": scale.visible},
        "chunked": {"attention_chunk_size": scale.visible, "full_attention_every": 4},
        "sinks": {
            "sliding_window": scale.visible - scale.sinks,
            "attention_sinks": scale.sinks,
        },
    }


def write_config(device: str, pattern: dict[str, int], path: Path) -> None:
    """The device's configuration with ``pattern`` in its one pool."""
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"attention-{device}.yaml").read_text())
    if not config["model"].startswith("/"):
        config["model"] = str((CONFIGS / config["model"]).resolve())
    if pattern:
        config["pools"]["only"]["local_attention"] = pattern
    path.write_text(yaml.safe_dump(config, sort_keys=False))


@dataclass(frozen=True, slots=True)
class Measured:
    """One kind: its sweep, its crowd, and how many sequences of the longest its cache holds."""

    kind: str
    sweep: FinishedRun
    crowd: FinishedRun
    held: tuple[int, float] | None  # tokens of a sequence, sequences: vLLM's own figure


def measure(kind: str, pattern: dict[str, int], chosen: argparse.Namespace) -> Measured:
    """Serve the engine under ``pattern`` and send it the sweep and the crowd."""
    scale: Scale = SCALES[chosen.device]
    config = chosen.out / f"{kind}.yaml"
    write_config(chosen.device, pattern, config)
    sweep, crowd = chosen.out / f"{kind}-sweep", chosen.out / f"{kind}-crowd"
    system = System("ours", str(config), model=chosen.model)
    with Session(system) as session:
        options = ("--output-tokens", str(scale.output), "--label", kind)
        warm_up = ("--lengths", scale.crowd_length, "--repeats", "1", "--floor", "0")
        loads.run("long_context", session.url, chosen.out / f"{kind}-warm-up", *warm_up)
        lengths = ("--lengths", chosen.lengths or scale.lengths, "--repeats", str(scale.repeats))
        loads.run("long_context", session.url, sweep, *lengths, *options)
        count = str(chosen.crowd or scale.crowd)
        at_once = ("-u", count, "-r", count, "--repeats", count, "--floor", "0")
        loads.run(
            "long_context", session.url, crowd, "--lengths", scale.crowd_length, *at_once, *options
        )
        return Measured(kind, read_run(sweep), read_run(crowd), held(session.printed))


def held(printed: str) -> tuple[int, float] | None:
    """How many sequences vLLM said that its KV cache holds; None if it said nothing."""
    found = _HELD.search(printed)
    return (int(found[1].replace(",", "")), float(found[2])) if found else None


def table(measured: Sequence[Measured]) -> str:
    """A line for each kind and prompt length, then what a crowd gets, in Markdown."""
    lines = [
        "| attention | prompt tokens | TTFT p50 s | decode ms/token | needles found |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for each in measured:
        for tokens in sorted({r.prompt_tokens_asked for r in each.sweep.answered}):
            mine = [r for r in each.sweep.answered if r.prompt_tokens_asked == tokens]
            ttft = percentile((r.ttft_ms for r in mine if r.ttft_ms is not None), 0.5)
            itl = percentile((r.itl_ms for r in mine if r.itl_ms is not None), 0.5)
            found = f"{sum(r.found is True for r in mine)}/{len(mine)}"
            cells = (each.kind, f"{tokens:,}", figure(ttft / 1e3), figure(itl), found)
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| attention | sequences held | requests at once | answered | output tokens/s | run |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for each in measured:
        total = each.crowd.summary["classes"][-1]
        holds = f"{each.held[1]:g} of {each.held[0]:,} tokens" if each.held else "-"
        valid = each.sweep.summary["valid"] and each.crowd.summary["valid"]
        counts = (str(total["count"]), str(total["ok"]), figure(total["output_tokens_s"]))
        line = (each.kind, holds, *counts, "valid" if valid else "INVALID")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare kinds of attention, whole stack.")
    parser.add_argument("--device", choices=tuple(SCALES), default="gpu")
    parser.add_argument("--kinds", default="", help="comma-separated (default: all four)")
    parser.add_argument("--lengths", default="", help="prompt tokens, k = 1024, commas")
    parser.add_argument("--crowd", type=int, default=0, help="requests at once")
    parser.add_argument("--out", type=Path, default=Path("runs/attention-kinds"))
    chosen = parser.parse_args()
    known = patterns(SCALES[chosen.device])
    chosen.kinds = chosen.kinds.split(",") if chosen.kinds else list(known)
    if unknown := set(chosen.kinds) - set(known):
        parser.error(f"{', '.join(unknown)}: kinds are {', '.join(known)}")
    return chosen


def main() -> None:
    chosen = arguments()
    chosen.out.mkdir(parents=True, exist_ok=True)
    chosen.model = shape.model_for(
        chosen.device, chosen.out, shape.QWEN3_06B | {"max_position_embeddings": 131072}
    )
    known = patterns(SCALES[chosen.device])
    measured = []
    for kind in chosen.kinds:
        measured.append(measure(kind, known[kind], chosen))
        print(f"\n{table(measured[-1:])}\n", flush=True)
    page = write_report([each.sweep.directory for each in measured], chosen.out)
    print(f"\n{table(measured)}\n\n{page}")


if __name__ == "__main__":
    main()
