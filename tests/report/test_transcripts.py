"""Transcripts: which samples, which text, which colour."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from demo_run import byte_tokenizer, demo_run

from miles.data.store.run_dir import RunDir
from miles.data.store.shard import open_shard
from miles.data.store.train_record import open_train_record
from miles.report.records import read_run
from miles.report.token_text import TokenText, load_token_text
from miles.report.transcripts import ShownSample, choose_rows, difference_class, probability_class, transcripts, visible


@pytest.mark.parametrize(
    ("difference", "name"),
    [(0.0, ""), (-0.0, ""), (1e-9, "u1"), (-1e-9, "n1"), (5e-6, "u2"), (-5e-4, "n3"), (0.05, "u4"), (0.11, "u5"), (-3.0, "n5"), (float("inf"), "u5")],
)
def test_colour_of_a_difference(difference: float, name: str) -> None:
    assert difference_class(difference) == name


@pytest.mark.parametrize(("probability", "name"), [(1.0, ""), (0.9, ""), (0.89, "p1"), (0.3, "p2"), (0.1, "p3"), (0.02, "p4"), (1e-9, "p5")])
def test_colour_of_a_probability(probability: float, name: str) -> None:
    assert probability_class(probability) == name


def test_pieces_join_to_the_text_whatever_the_cut() -> None:
    tokenizer = byte_tokenizer()
    words = "Hmm… π ≈ 3.14, 日本 🙂\n\tthe end"
    ids = tokenizer.encode(words).ids
    pieces = TokenText(tokenizer).pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == words
    assert "" in pieces, "a byte inside a character has no text of its own"
    assert pieces[ids.index(tokenizer.token_to_id("the"))] == "the"


def test_ids_without_a_tokenizer(tmp_path: Path) -> None:
    run = demo_run(tmp_path / "run", rollouts=2, restarts=0)
    (run.hf / "tokenizer.json").unlink()
    text = load_token_text(read_run(run.path))
    assert text.pieces([5, 17]) == ["5 ", "17 "]
    assert "no tokenizer.json was found" in text.note
    (run.hf / "tokenizer.json").write_text("{")
    assert "could not be read" in load_token_text(read_run(run.path)).note
    assert transcripts(read_run(run.path)).batches


def test_invisible_characters_are_made_visible() -> None:
    assert visible("a<\n") == 'a&lt;<span class="ctl">↵</span>\n'
    assert visible("\x00") == '<span class="ctl">\u2400</span>'
    assert visible("") == '<span class="ctl">·</span>'


def spans(markup: str) -> list[tuple[str, str]]:
    """(classes, tooltip) of every token."""
    return [(classes, unescape(tooltip)) for classes, tooltip in re.findall(r'<span class="(t[^"]*)" title="([^"]*)"', markup)]


def test_every_shown_token_has_the_difference_on_disk(noisy: RunDir) -> None:
    record = read_run(noisy.path)
    shown = transcripts(record)
    last = shown.batches[0]
    assert last.title == "Rollout of step 42, the last"
    compared = equal = 0
    for sample in last.samples:
        index, row, rollout = place_of(noisy, 42, sample)
        (train,) = [values for path in noisy.train(42).glob("*.h5") for values in trained_of(path, index, row)]
        tokens = spans(sample.head + sample.tail)
        assert len(tokens) == len(rollout)
        for (classes, tooltip), ours, theirs in zip(tokens, train[-len(rollout) :], rollout, strict=True):
            sign = next((name[0] for name in classes.split() if re.fullmatch(r"[un][1-5]", name)), "")
            assert sign == ("" if ours == theirs else "u" if ours > theirs else "n")
            assert f"train   {ours:.7g}" in tooltip
            assert f"rollout {theirs:.7g}" in tooltip
            compared += 1
            equal += ours == theirs
    first = shown.batches[1]
    assert first.title == "Rollout of step 13, the first"
    assert compared < shown.compared
    assert equal <= shown.equal


def test_best_worst_and_longest_of_different_prompts_are_shown(noisy: RunDir) -> None:
    shown = transcripts(read_run(noisy.path))
    batch = next(batch for batch in shown.batches if batch.title.startswith("Rollout of step 13"))
    tables = [sequences_of(noisy.batch(13) / f"rollout.{worker}.h5") for worker in (0, 1)]
    rewards = np.concatenate([table["reward"] for table in tables])
    longest = max(
        (int(length), int(table["draw"][row]), int(table["sample"][row])) for table in tables for row, length in enumerate(np.diff(table["offset"].astype(np.int64)))
    )
    assert len({sample.draw for sample in batch.samples}) == 4
    assert (float(batch.samples[0].reward), float(batch.samples[1].reward)) == (rewards.max(), rewards.min())
    assert (batch.samples[2].draw, batch.samples[2].sample) == longest[1:]
    assert batch.samples[2].tail, "the long one is folded"


def test_siblings_are_shown_where_there_is_one_prompt_only(tmp_path: Path) -> None:
    run = demo_run(tmp_path / "run", rollouts=2, restarts=0)
    tables = {0: sequences_of(run.batch(14) / "rollout.0.h5")}
    rows = np.flatnonzero(tables[0]["draw"] == tables[0]["draw"][0])
    one = {name: values[rows] for name, values in tables[0].items() if name in ("draw", "reward")}
    chosen = choose_rows({0: {**one, "offset": tables[0]["offset"][: len(rows) + 1]}})
    assert len(set(chosen)) == len(chosen) == 4


def sequences_of(path: Path) -> dict[str, np.ndarray]:
    with open_shard(path) as shard:
        return shard.sequences()


def trained_of(path: Path, shard: int, row: int) -> list[np.ndarray]:
    """The trainer's log-probs of a sequence: one array, or none where another node's record has it."""
    with open_train_record(path) as record:
        table = record.sequences()
        entries = np.flatnonzero((table["shard"] == shard) & (table["row"] == row))
        return [record.tokens(int(entry), int(entry) + 1, ["train_logprob"])["train_logprob"].astype(np.float64) for entry in entries]


def place_of(run: RunDir, step: int, sample: ShownSample) -> tuple[int, int, np.ndarray]:
    """(index of the shard, row, rollout log-probs of the response) of a shown sample."""
    for index in (0, 1):
        with open_shard(run.batch(step) / f"rollout.{index}.h5") as shard:
            table = shard.sequences()
            for row in np.flatnonzero((table["draw"] == sample.draw) & (table["sample"] == sample.sample)):
                start = int(table["prompt_length"][row])
                return index, int(row), shard.tokens(int(row), int(row) + 1)["rollout_logprob"][start:].astype(np.float64)
    raise AssertionError(f"no shard holds {sample.name}")


def test_a_batch_not_yet_trained_on_has_no_differences(tmp_path: Path) -> None:
    run = demo_run(tmp_path / "run", rollouts=2, noise=1e-3, restarts=0)
    for path in run.train(14).iterdir():
        path.unlink()
    shown = transcripts(read_run(run.path))
    assert shown.batches[0].title == "Rollout of step 14, the last"
    assert all(sample.difference == "" for sample in shown.batches[0].samples)
    assert "train   " not in shown.batches[0].samples[0].head


def test_first_batches_removed_by_retention(tmp_path: Path) -> None:
    run = demo_run(tmp_path / "run", rollouts=3, restarts=0)
    for path in run.batch(13).iterdir():
        path.unlink()
    run.batch(13).rmdir()
    titles = [batch.title for batch in transcripts(read_run(run.path)).batches]
    assert titles == ["Rollout of step 15", "Evaluation after step 15, the last", "Evaluation after step 12, the first"]
