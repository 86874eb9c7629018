"""Files and folders that a run names and that can't serve: refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.config.compose import load_config
from miles.config.exits import UserError
from miles.data.store.run_dir import RunDir
from miles.plan.place import misplaced
from miles.slurm.checks import files
from miles.slurm.records import left_out


@pytest.mark.parametrize("name", ["a\\b", "a\nb"])
def test_a_run_directory_that_slurm_would_misread(tmp_path: Path, name: str) -> None:
    (found,) = files(load_config(["recipes/tiny"], ["cluster.executor=slurm"]), RunDir(tmp_path / name))
    assert (found.level, found.where, found.mend) == ("error", "--run-dir", "choose another --run-dir")
    assert len(str(found).splitlines()) == 1
    assert list(files(load_config(["recipes/tiny"], ["cluster.executor=slurm"]), RunDir(tmp_path / "a b%j"))) == []


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    """A warning, where the nodes may have what the login node hasn't; none for a tree that is on the nodes alone, or in an image."""

    def warned(*words: str) -> list[tuple[str, str]]:
        return [(found.where, found.level) for found in files(load_config(["recipes/tiny"], ["cluster.executor=slurm", *words]), RunDir(tmp_path / "run"))]

    python = tmp_path / "bin" / "python"
    assert warned(f"cluster.groups.all.python={python}", f"cluster.slurm.python={python}") == [("cluster.groups.all.python", "warning"), ("cluster.slurm.python", "warning")]
    assert warned("cluster.groups.all.python=/nowhere/at/all/python") == warned("cluster.groups.all.python=python3.11") == []
    assert warned(f"cluster.groups.all.python={python}", "cluster.groups.all.container_image=registry#image") == []
    python.parent.mkdir()
    python.touch()
    assert warned(f"cluster.groups.all.python={python}") == []


@pytest.mark.parametrize("content", [None, "[]", "{}", '{"nodes": ["a"]}', '{"nodes": {"a b": 1}}', "nodes"])
def test_an_exclude_file_that_is_none(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "list"
    path.mkdir() if content is None else path.write_text(content)
    config = load_config(["recipes/tiny"], [f"cluster.slurm.exclude_file={path}"])
    with pytest.raises(UserError) as refused:
        left_out(RunDir(tmp_path), config)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"cluster.slurm.exclude_file: {path}")
    assert line.endswith("; choose another, or remove it and let miles-submit preflight write it")


def test_nodes_that_run_nothing() -> None:
    def warned(*words: str) -> list[tuple[str, ...]]:
        return [entry for entry in misplaced(load_config(["recipes/tiny"], ["cluster.executor=slurm", *words])) if entry[0] == "warning"]

    assert warned("cluster.placement=colocate", "cluster.groups.all.nodes=40") == [
        ("warning", "cluster.groups.all.nodes", "40 nodes are allocated, 39 of them run nothing", "set it to 1, or leave it out")
    ]
    assert warned("cluster.placement=colocate", "cluster.groups.all.nodes=1") == warned("cluster.placement=colocate") == []
