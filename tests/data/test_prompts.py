"""Prompt sets: files, slices, reasoning-gym, order, disjointness."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import reasoning_gym

from miles.config.compose import load_config
from miles.config.exits import UserError
from miles.config.schema import RunConfig, Source
from miles.data.prompts import load_prompts, normalise, permutation, read_source

TERMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_a_jsonl_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"q": "one", "a": "1", "metadata": {"level": 3}},
        {"q": [{"role": "user", "content": "two"}], "a": 2},
        {"q": "three", "a": None, "metadata": None},
    )
    rows = read_source("data", Source(prompt_data=str(path), input_key="q", label_key="a"), 0).rows
    assert [row.prompt for row in rows] == ["one", [{"role": "user", "content": "two"}], "three"]
    assert [row.label for row in rows] == ["1", "2", None]
    assert [row.metadata for row in rows] == [{"level": 3}, {}, {}]
    assert rows[1].place == f"{path}:2"


def test_rows_of_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    chat = [[{"role": "user", "content": f"p{i}"}] for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": chat, "answer": [str(i) for i in range(5)], "info": [{"n": i} for i in range(5)]}), path)
    source = Source(prompt_data=f"{path}@[1:-1]", input_key="prompt", label_key="answer", metadata_key="info")
    rows = read_source("data", source, 0).rows
    assert [row.prompt for row in rows] == chat[1:4]
    assert [(row.label, row.metadata) for row in rows] == [("1", {"n": 1}), ("2", {"n": 2}), ("3", {"n": 3})]


@pytest.mark.parametrize(("part", "expected"), [("@[1:3]", [1, 2]), ("@[:2]", [0, 1]), ("@[-2:]", [4, 5]), ("", [0, 1, 2, 3, 4, 5]), ("@[4:99]", [4, 5])])
def test_slices(tmp_path: Path, part: str, expected: list[int]) -> None:
    path = write(tmp_path / "a.jsonl", *({"input": str(i)} for i in range(6)))
    assert [row.prompt for row in read_source("data", Source(prompt_data=f"{path}{part}"), 0).rows] == [str(i) for i in expected]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("a.jsonl@[6:]", "the slice holds no rows; the file has 6"),
        ("a.jsonl@[x:2]", "not a slice of rows"),
        ("a.jsonl@[-:2]", "not a slice of rows"),
        ("a.csv", "unknown kind of file .csv"),
        ("a.jsnl", "no such file; did you mean"),
        ("broken.parquet", "not a readable Parquet file"),
        ("gone/a.jsonl", "no such file"),
        (".", "is a folder"),
    ],
)
def test_faults_of_files(tmp_path: Path, name: str, part: str) -> None:
    write(tmp_path / "a.jsonl", *({"input": str(i)} for i in range(6)))
    (tmp_path / "a.csv").write_text("input\n1\n")
    (tmp_path / "broken.parquet").write_text("no")
    with pytest.raises(UserError, match=part.replace("(", r"\(")) as caught:
        read_source("data", Source(prompt_data=str(tmp_path / name)), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        (Source(), "data: no prompts; set data.prompt_data"),
        (Source(reasoning_gym="chain_sums", reasoning_gym_config={"seed": 1}), "no data set 'chain_sums'; did you mean 'chain_sum'"),
        (Source(reasoning_gym="chain_sum", reasoning_gym_config={"size": 3}), "no seed"),
        (Source(reasoning_gym="qqqq", reasoning_gym_config={"seed": 1}), "no data set 'qqqq'; take one of reasoning-gym's "),
        (Source(reasoning_gym="chain_sum", reasoning_gym_config={"seed": None, "size": 3}), "no seed"),
        (Source(reasoning_gym="chain_sum", reasoning_gym_config={"seed": 1, "min_trems": 3}), "chain_sum has no key 'min_trems'; did you mean 'min_terms'?"),
        (Source(reasoning_gym="chain_sum", reasoning_gym_config={"seed": 1, "zzz": 3}), "chain_sum has no key 'zzz'; it has min_terms, max_terms, "),
        (Source(reasoning_gym="chain_sum", reasoning_gym_config={"seed": 1, "size": "many"}), "chain_sum refuses it: '>' not supported"),
        (Source(reasoning_gym="chain_sum", reasoning_gym_config={"seed": 1, "size": 2, "min_terms": 2.5}), "chain_sum refuses it: "),
        (Source(reasoning_gym="chain_sum", reasoning_gym_config={"seed": 1, "min_terms": 0}), "chain_sum refuses it"),
    ],
)
def test_faults_of_sections(source: Source, part: str) -> None:
    with pytest.raises(UserError, match=part):
        read_source("data", source, 0)


def test_reasoning_gym_questions_once_each() -> None:
    source = Source(reasoning_gym="chain_sum", reasoning_gym_config={"seed": 7, "size": 400, **TERMS})
    rows = read_source("data", source, 0).rows
    made = reasoning_gym.create_dataset("chain_sum", seed=7, size=400, **TERMS)
    expected = list(dict.fromkeys(" ".join(made[i]["question"].lower().split()) for i in range(400)))
    assert [" ".join(str(row.prompt).lower().split()) for row in rows] == expected
    assert len(expected) < 400
    for row in rows:
        entry = made[row.metadata["reasoning_gym_index"]]
        assert (entry["question"], entry["answer"]) == (row.prompt, row.label)


def test_order_without_shuffle_repeats_the_file(tmp_path: Path) -> None:
    prompts = read_source("data", Source(prompt_data=str(write(tmp_path / "a.jsonl", *({"input": str(i)} for i in range(3))))), 0)
    assert [prompts.draw(n).prompt for n in range(7)] == ["0", "1", "2", "0", "1", "2", "0"]


def test_shuffled_epochs_are_permutations_that_depend_on_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"input": str(i)} for i in range(50)))
    source = Source(prompt_data=str(path), shuffle=True)
    prompts, other = read_source("data", source, 5), read_source("data", source, 6)
    epochs = [[prompts.draw(n).prompt for n in range(first, first + 50)] for first in (0, 50)]
    assert sorted(map(int, epochs[0])) == sorted(map(int, epochs[1])) == list(range(50))
    assert epochs[0] != epochs[1]
    assert epochs[0] != [other.draw(n).prompt for n in range(50)]
    assert epochs[1] == [read_source("data", source, 5).draw(n).prompt for n in range(50, 100)]  # no state


def test_the_permutation_is_frozen() -> None:
    """A resumed run sees the order that it began with: splitmix64 by plain integers."""
    mask = 2**64 - 1

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    for seed, epoch in ((42, 0), (-1, 3)):
        key = mix(mix(seed & mask) ^ mix(epoch))
        assert permutation(20, seed, epoch).tolist() == sorted(range(20), key=lambda row: mix(key ^ row))


def test_normalised_strings() -> None:
    assert normalise("  What IS\t2 +\n3? ") == "what is 2 + 3?"
    assert normalise([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "STRASSE  Straße"}]) == "be brief. strasse strasse"


def run_config(*overrides: str) -> RunConfig:
    return load_config([], list(overrides))


def test_a_made_source_drops_what_the_others_have() -> None:
    gym = "{seed: %d, size: 60, min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}"
    overrides = ["warm_start.steps=1", "eval.interval=1"]
    for name, seed, other in (("warm_start", 1000, "[eval]"), ("data", 2000, "[warm_start, eval]"), ("eval", 3000, "[]")):
        overrides += [f"{name}.reasoning_gym=chain_sum", f"{name}.reasoning_gym_config={gym % seed}", f"{name}.exclude={other}"]
    found = load_prompts(run_config(*overrides))
    keys = {name: {" ".join(str(row.prompt).lower().split()) for row in prompts.rows} for name, prompts in found.items()}
    raw = {" ".join(reasoning_gym.create_dataset("chain_sum", seed=2000, size=60, **TERMS)[i]["question"].lower().split()) for i in range(60)}
    assert raw & keys["eval"]  # by chance they overlap, so that something had to go
    assert not keys["data"] & keys["eval"]
    assert not keys["data"] & keys["warm_start"]
    assert not keys["warm_start"] & keys["eval"]
    assert keys["data"] <= raw


def test_a_made_source_without_anything_left() -> None:
    same = "{seed: 5, size: 20, min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}"
    overrides = [f"{name}.{key}" for name in ("data", "eval") for key in ("reasoning_gym=chain_sum", f"reasoning_gym_config={same}")]
    with pytest.raises(UserError, match="data: every prompt occurs in eval as well"):
        load_prompts(run_config("eval.interval=1", "data.exclude=[eval]", *overrides))


def test_an_overlap_of_files_is_an_error_with_an_example(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", {"input": "other"}, {"input": "Same  thing"})
    held_out = write(tmp_path / "eval.jsonl", {"input": "x"}, {"input": "y"}, {"input": "same thing"})
    overrides = ["eval.interval=1", f"data.prompt_data={data}", f"eval.prompt_data={held_out}"]
    load_prompts(run_config(*overrides))  # nothing excluded, nothing said
    with pytest.raises(UserError, match=rf"data.jsonl:2: this prompt occurs in {held_out}:3 too.*'same thing'"):
        load_prompts(run_config(*overrides, "data.exclude=[eval]"))


def test_only_sources_in_use_are_read(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", {"input": "a"})
    found = load_prompts(run_config(f"data.prompt_data={data}", "eval.prompt_data=/nowhere.jsonl", "data.exclude=[warm_start]"))
    assert list(found) == ["data"]
