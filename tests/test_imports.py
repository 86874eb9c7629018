"""Imports point downwards, and the login node's packages need neither torch nor transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "miles"
# What each package may import of miles, besides itself.
ALLOWED = {
    "config": set(),
    "plan": {"config"},
    "data": {"config"},
    "precision": {"config"},
    "models": {"config", "precision"},
    "algorithms": {"config"},
    "engine": {"config", "models", "precision"},
    "rollout": {"config", "data", "engine"},
    "training": {"config", "data", "models", "precision", "algorithms"},
    "convert": {"config", "models", "precision"},
    "sync": {"config", "engine", "models", "training"},
    "analysis": {"config", "data", "precision", "report"},
    "recipes": {"config"},
    "slurm": {"config", "data", "plan", "report"},
    "report": {"config", "data"},
    "run": {"config", "data", "engine", "rollout", "training", "sync", "algorithms", "models", "precision"},
    "trackers": {"config", "data"},
    "cli": {"config", "plan", "slurm", "report", "data", "analysis"},
}
LIGHT = ("config", "slurm", "plan", "cli", "report", "trackers")


def imported(path: Path) -> set[str]:
    """Top packages of miles that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module] if node.module != "miles" else [f"miles.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("miles.")}
    return found


@pytest.mark.parametrize("package", sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()))
def test_imports_point_downwards(package: str) -> None:
    wrong = {
        str(path.relative_to(PACKAGE)): sorted(bad)
        for path in (PACKAGE / package).rglob("*.py")
        if (bad := imported(path) - ALLOWED[package] - {package})
    }
    assert not wrong


def test_relative_imports_are_not_used() -> None:
    relative = [
        str(path)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def modules_of(*packages: str) -> list[str]:
    return [
        ".".join(("miles", *path.relative_to(PACKAGE).with_suffix("").parts))
        for package in packages
        for path in sorted((PACKAGE / package).rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py")
    ]


def loaded_by(code: str, names: set[str]) -> str:
    """Which of these modules are there after some code."""
    code = f"import importlib, runpy, sys\n{code}\nprint(sorted({names!r} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_light_packages_load_no_torch() -> None:
    modules = modules_of(*LIGHT)
    assert len(modules) > 10
    assert loaded_by(f"for m in {modules!r}: importlib.import_module(m)", {"torch", "transformers", "numba"}) == "[]"


def test_analysis_and_its_tools_load_no_torch() -> None:
    modules = modules_of("analysis")
    scripts = [str(path) for path in sorted((PACKAGE.parent / "tools/analyze").glob("*.py"))]
    assert len(modules) > 10
    assert scripts
    code = f"for m in {modules!r}: importlib.import_module(m)\nfor s in {scripts!r}: runpy.run_path(s, run_name='looked at')"
    assert loaded_by(code, {"torch", "transformers", "numba"}) == "['numba']"


def test_no_two_test_modules_of_a_suite_have_one_name() -> None:
    """pytest imports them by their bare names: the second of two would not be run."""
    suites = {"faults": [], "": []}
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        suites["faults" if "faults" in path.parts else ""].append(path.name)
    assert not [name for names in suites.values() for name in names if names.count(name) > 1]
