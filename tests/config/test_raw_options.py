"""Names that a user chooses freely: those that a shell would run, that miles owns, or that lead out of a folder are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.config.compose import load_config
from miles.config.exits import ConfigError

GROUP = "cluster.groups.all"


def said(tmp_path: Path, key: str, value: object) -> str:
    """The line about a value, given in a file."""
    nested: object = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    (tmp_path / "recipe.yaml").write_text(json.dumps(nested))
    with pytest.raises(ConfigError) as refused:
        load_config([tmp_path / "recipe.yaml"])
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{tmp_path}/recipe.yaml:1: {key}: ")
    return line.removeprefix(f"{tmp_path}/recipe.yaml:1: {key}: ")


@pytest.mark.parametrize("name", ["A;touch x;B", "A=B", "$(touch x)", "", "A\nB", "1A", "A B", "A`x`", "Ä", "A-B", "A\n"])
def test_a_variable_that_a_shell_would_take_for_more(tmp_path: Path, name: str) -> None:
    assert said(tmp_path, f"{GROUP}.environment", {"OK_1": "1", name: "1"}) == f"{name!r} is no name of an environment variable; write letters, digits and _, the first no digit"


def test_a_value_that_no_environment_holds(tmp_path: Path) -> None:
    assert said(tmp_path, f"{GROUP}.environment", {"A": "x\0y"}) == "A: a value can't hold a NUL; remove it"
    assert said(tmp_path, f"{GROUP}.setup", ["true", "x\0y"]) == "line 2 holds a NUL; remove it"


def test_mounts_are_paths_that_pyxis_does_not_divide(tmp_path: Path) -> None:
    for mount in ("/a,b:/c", "/a:b:/c", "/a", "/a:", "/a:/b:RO", "/a:/b,/c:/d"):
        assert said(tmp_path, f"{GROUP}.container_mounts", ["/data:/data:ro+rprivate", mount]).startswith(f"'{mount}' is not FROM:TO or FROM:TO:FLAGS; no path may hold a comma or a colon: ")


@pytest.mark.parametrize(
    ("kind", "option", "mend"),
    [
        ("sbatch", "array", "miles-submit sweep"),
        ("sbatch", "arr", "miles-submit sweep"),  # as sbatch takes it
        ("sbatch", "output", "RUN/slurm"),
        ("sbatch", "error", "RUN/slurm"),
        ("sbatch", "open-mode", "RUN/slurm"),
        ("sbatch", "signal", "cluster.slurm.lead_seconds"),
        ("sbatch", "requeue", "cluster.slurm.requeue"),
        ("sbatch", "no-requeue", "cluster.slurm.requeue"),
        ("sbatch", "job-name", "cluster.slurm.job_name"),
        ("sbatch", "nodes", "cluster.groups.*.nodes"),
        ("sbatch", "ntasks", "cpus_per_task"),
        ("sbatch", "ntasks-per-node", "cpus_per_task"),
        ("sbatch", "tasks-per-node", "cpus_per_task"),
        ("sbatch", "dependency", "cluster.slurm.requeue=chain"),
        ("sbatch", "wrap", "cluster.groups.*.setup"),
        ("sbatch", "hetjob", "cluster.placement=het"),
        ("sbatch", "exclude", "cluster.groups.*.exclude"),
        ("srun", "output", "RUN/slurm"),
        ("srun", "ntasks", "cpus_per_task"),
        ("srun", "relative", "cluster.groups.*.nodes"),
    ],
)
def test_options_that_miles_owns(tmp_path: Path, kind: str, option: str, mend: str) -> None:
    line = said(tmp_path, f"{GROUP}.{kind}", {"mail-type": "END", option: 1} if kind == "sbatch" else {"mpi": "none", option: 1})
    assert line.startswith(f"{option}: miles sets ")
    assert mend in line
    assert line.endswith("; remove it")


@pytest.mark.parametrize("name", ["--mail-type", "mail_type", "mail type", "x\n#SBATCH --uid", "", "a=b"])
def test_what_is_no_options_name(tmp_path: Path, name: str) -> None:
    assert said(tmp_path, f"{GROUP}.sbatch", {name: None}) == f"{name!r} is no option of sbatch; write its long name without dashes"


def test_other_options_are_taken() -> None:
    config = load_config(
        ["recipes/tiny"],
        [f"{GROUP}.sbatch={{hold: null, begin: now, time: 5, nice: 3, nodefile: x, mail-type: END, network: x, export: ALL}}", f"{GROUP}.srun={{mpi: none, cpu-bind: cores, mem: 0, export: ALL}}"],
    )
    assert set(config.cluster.groups.all.sbatch) == {"hold", "begin", "time", "nice", "nodefile", "mail-type", "network", "export"}


@pytest.mark.parametrize("name", ["../../x", "a/b", "/tmp/x", "..", ".", "", "a\nb"])
def test_a_name_that_leads_out_of_the_folder_of_runs(tmp_path: Path, name: str) -> None:
    assert said(tmp_path, "name", name).startswith(f"{name!r} can't be the name of a folder (runs/NAME is the default of --run-dir); ")


def test_names_that_stay() -> None:
    for name in ("a b", "..a", "größe.1", "100%"):
        assert load_config(["recipes/tiny"], [f"name={name}"]).name == name
