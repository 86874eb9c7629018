"""What is submitted and planned, to the letter. After a change on purpose: make golden, and look at the difference."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from golden_texts import (
    BY_HAND,
    CASES,
    HERE,
    NAMES,
    RECIPES,
    TEMPLATES,
    by_hand_template,
    recipe_plan,
    recipe_submission,
    submission,
    template,
)


def golden(folder: str, name: str) -> str:
    return (HERE / folder / name).read_text()


@pytest.mark.parametrize("case", CASES)
def test_submission(case: str) -> None:
    assert submission(case) == golden("submissions", f"{case}.txt")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, tmp_path: Path) -> None:
    assert recipe_submission(recipe) == golden("recipes", f"{recipe}.sbatch.txt")
    assert recipe_plan(recipe, tmp_path.resolve()) == golden("recipes", f"{recipe}.plan.txt")


@pytest.mark.parametrize("name", NAMES)
def test_template(name: str) -> None:
    assert template(name) == (TEMPLATES / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("name", BY_HAND)
def test_template_by_hand(name: str, tmp_path: Path) -> None:
    assert by_hand_template(name, tmp_path) == golden("templates", f"{name}.txt")
    bare = subprocess.run(["bash", TEMPLATES / f"{name}.sbatch"], capture_output=True, text=True, check=False)
    assert (bare.returncode, bare.stdout) == (78, "")
    assert bare.stderr.startswith(f"usage: sbatch sbatch/{name}.sbatch ")


@pytest.mark.parametrize("name", [*(f"submissions/{case}.txt" for case in CASES), *(f"recipes/{recipe}.sbatch.txt" for recipe in RECIPES)])
def test_every_script_is_one_that_bash_reads(name: str) -> None:
    for script in (HERE / name).read_text().split("\n--- ")[1:]:
        if script.startswith("srun on"):
            continue
        done = subprocess.run(["bash", "-n"], input=script.partition("\n")[2], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_no_golden_text_is_without_its_test() -> None:
    wanted = {*(f"{name}.txt" for name in BY_HAND), *(f"{case}.txt" for case in CASES), *(f"{recipe}.{kind}.txt" for recipe in RECIPES for kind in ("sbatch", "plan"))}
    assert {path.name for folder in ("submissions", "recipes", "templates") for path in (HERE / folder).iterdir()} == wanted
