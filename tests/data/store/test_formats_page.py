"""docs/formats.md in step with the code."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from miles.data.store import journal, manifest, routes, run_dir, shard, train_record
from miles.data.store.routes import write_routes
from miles.data.store.shard import write_shard

PAGE = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()


def documented(heading: str) -> set[str]:
    """Datasets in the first column of the table under a heading."""
    table = PAGE.split(heading)[1].split("\n## ")[0]
    found = set()
    for cell in re.findall(r"^\| (/[^|]*) \|", table, re.MULTILINE):
        first, *others = cell.split(", ")
        found |= {first[1:], *(f"{first[1:].split('/')[0]}/{other}" for other in others)}
    return found


def test_every_dataset_of_a_shard_is_on_the_page(tmp_path, make_sample):
    write_shard(tmp_path / "a.h5", [make_sample(0, 0, prompt="p", response="r", label="l", kept_mass=np.ones(5, np.float16))])
    found = set()
    with h5py.File(tmp_path / "a.h5", "r") as file:
        file.visititems(lambda name, item: found.add(name) if isinstance(item, h5py.Dataset) else None)
    assert found == documented("## Shard:")


def test_every_dataset_of_a_train_record_is_on_the_page():
    assert {f"tokens/{name}" for name in train_record.TOKENS} | {f"layers/{name}" for name in train_record.LAYERS} | {"sequences/shard", "sequences/row", "sequences/offset", "sequences/rank"} == documented("## What training saw:")


@pytest.mark.parametrize("schema", [shard.SCHEMA, routes.SCHEMA, train_record.SCHEMA, journal.SCHEMA, manifest.SCHEMA, run_dir.PLAN_SCHEMA, run_dir.PROVENANCE_SCHEMA])
def test_every_schema_is_on_the_page(schema):
    assert f"`{schema}`" in PAGE


def test_every_key_of_a_manifest_is_on_the_page():
    section = PAGE.split("## Batch:")[1].split("\n## ")[0]
    assert [name for name in manifest.Manifest.model_fields if name != "schema_" and f"`{name}`" not in section] == []


def test_the_example_runs(tmp_path, make_sample, monkeypatch, capsys):
    samples = [make_sample(draw, 0, draw, 3, reward=float(draw), routes=np.zeros((draw + 2, 1, 1), np.uint8)) for draw in range(7)]
    write_shard(tmp_path / "batches" / "step_000012" / "rollout.0.h5", samples)
    write_routes(tmp_path / "batches" / "step_000012" / "routes.0.h5", samples)
    monkeypatch.chdir(tmp_path)
    exec(PAGE.split("```python\n")[1].split("```")[0], {})
    printed = capsys.readouterr().out
    assert printed.startswith("5.0 ")
    assert all(str(token) in printed for token in samples[5].token_id[5:].tolist())
