"""Imports inside ``serve_app`` point downward only, and ``load_tests`` tests the wire alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each module may import from the modules of the layers below it, and from those named beside it.
LAYERS: list[set[str]] = [
    {
        "errors",
        "pattern",
        "config",
        "request",
        "metrics",
        "guard.limits",
        "guard.document",
        "guard.structure",
        "guard.body",
        "keys",
        "openapi",
        "port",
        "tracing",
    },
    {"balance", "batching", "lengths", "capacity", "placement", "quality.grid", "quality.verdict"},
    {"router", "absence", "upstream", "autoscaling", "simulator"},
    {"api", "engine"},
    {
        "deployments",
        "model_config",
        "advice",
        "proposal",
        "preflight",
        "simulate",
        "client",
        "quality.command",
        "quality.picture",
        "quality.results",
        "quality.run",
        "cli",
    },
]
WITHIN_LAYER = {
    "config": {"errors", "pattern", "guard.limits"},
    "request": {"errors", "pattern"},
    "metrics": {"request"},
    "guard.limits": {"errors"},
    "guard.document": {"guard.limits"},
    "guard.structure": {"errors", "guard.limits", "guard.document"},
    "guard.body": {"errors", "guard.limits", "guard.document", "guard.structure"},
    "keys": {"config", "errors"},
    "port": {"errors"},
    "batching": {"balance"},
    "absence": {"router"},
    "advice": {"model_config"},
    "proposal": {"advice", "model_config"},
    "simulator": {"autoscaling"},
    "quality.verdict": {"quality.grid"},
    "quality.run": {"quality.results"},
    "quality.command": {
        "advice",
        "model_config",
        "preflight",
        "quality.picture",
        "quality.results",
    },
    "cli": {"advice", "client", "preflight", "proposal", "quality.command", "simulate"},
    "engine": {"local_attention"},  # to say which plan is in force
}
ASIDE = {
    "local_attention": {"config", "errors", "pattern"},
    "demo": {"config", "errors", "pattern"},
}


def module_of(*parts: str) -> str:
    """Where ``parts`` below ``serve_app`` belong: ``quality.grid`` has a layer of its own, while
    ``local_attention.rows`` is part of ``local_attention``.
    """
    inner = ".".join(parts[:2])
    return inner if any(inner in layer for layer in LAYERS) else parts[0]


def imported(path: Path) -> Iterator[str]:
    """The ``serve_app`` modules that a file imports anywhere, function bodies included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "serve_app" and "." in name:
                yield module_of(*name.split(".")[1:])


def allowed(module: str) -> set[str]:
    if module in ASIDE:
        return ASIDE[module] | {module}
    for depth, layer in enumerate(LAYERS):
        if module in layer:
            below = set().union(*LAYERS[:depth])
            # Only the top layer, which puts everything together, may reach aside.
            aside = set(ASIDE) if depth == len(LAYERS) - 1 else set()
            return below | aside | WITHIN_LAYER.get(module, set())
    raise AssertionError(f"{module} has no layer; name it in tests/test_layers.py")


@pytest.mark.parametrize(
    "path",
    sorted(path for path in (ROOT / "serve_app").rglob("*.py") if path.name != "__init__.py"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_imports_point_downward(path: Path) -> None:
    module = module_of(*path.relative_to(ROOT / "serve_app").with_suffix("").parts)
    stray = set(imported(path)) - allowed(module)
    assert not stray, f"{path.relative_to(ROOT)} may not import {sorted(stray)}"


@pytest.mark.parametrize("path", sorted((ROOT / "load_tests").rglob("*.py")), ids=lambda p: p.name)
def test_load_tests_know_only_the_wire(path: Path) -> None:
    assert not list(imported(path))
