"""speculative: verifications walked token by token in plain Python; and what is no result."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import Made, make_sample, make_train, write_run
from planted import plant
from script import script
from shard_rows import Row, rows_of

from miles.analysis.batches import Block
from miles.analysis.speculative import rounds_of, speculative
from miles.config.exits import UserError


def walk(flags: list[int]) -> list[tuple[int, int, int, bool]]:
    """(first token, last token, accepted drafts, ended by the model's own token) of each verification."""
    found, drafts = [], 0
    for place, flag in enumerate(flags):
        if flag & 8:
            drafts += 1
            follows = flags[place + 1] & 24 if place + 1 < len(flags) else 0
            if not follows:
                found.append((place - drafts + 1, place, drafts, False))
                drafts = 0
        elif flag & 16:
            found.append((place - drafts, place, drafts, True))
            drafts = 0
    return found


def figures(rounds: list[tuple[int, int, int, bool]]) -> dict[str, float]:
    accepted, own = sum(each[2] for each in rounds), sum(each[3] for each in rounds)
    return {"verifications": len(rounds), "tokens": accepted + own, "accept_length": (accepted + own) / len(rounds), "accepted_drafts": accepted, "draft_share": accepted / (accepted + own)}


def bucket(position: int) -> str:
    low = 1 << (position.bit_length() - 1) if position >= 8 else position
    return str(low) if position < 8 else f"{low}-{2 * low - 1}"


def check(folder: Path, rows: list[Row]) -> None:
    bags: dict[str, dict[Any, list[Any]]] = defaultdict(lambda: defaultdict(list))
    everything = []
    for row in rows:
        for each in walk(row.tokens["flags"].tolist()):
            everything.append(each)
            keys = {"step": row.step, "engine": row.engine, "source": row.source, "weight_version": row.version(each[1]), "position": bucket(each[0] - row.numbers["prompt_length"])}
            for name, key in keys.items():
                bags[name][key].append(each)
    found = speculative(folder)
    assert found["total"] == pytest.approx(figures(everything))
    for name, bag in bags.items():
        assert {row[name] for row in found[f"by_{name}"]} == set(bag)
        for row in found[f"by_{name}"]:
            assert {key: value for key, value in row.items() if key != name} == pytest.approx(figures(bag[row[name]]))
    counted = Counter(each[2] for each in everything)
    for row in found["accepted_in_a_verification"]:
        assert row["verifications"] == counted[row["drafts"]]
        assert row["share_with_as_many"] == pytest.approx(sum(number for drafts, number in counted.items() if drafts >= row["drafts"]) / len(everything))


def test_every_figure_is_that_of_a_walk_over_tokens(lively: Any) -> None:
    folder, _ = lively
    check(folder, rows_of(folder))


def test_random_marks_of_drafts(tmp_path: Path) -> None:
    random, made = np.random.default_rng(5), []
    for draw in range(8):
        sample = make_sample(random, draw, 0, int(random.integers(0, 9)), int(random.integers(1, 90)), 3)
        generated = np.arange(len(sample.token_id)) >= sample.prompt_length
        sample.flags = np.where(generated, 1 | random.choice([0, 8, 8, 8, 16], len(generated)), 0).astype(np.uint8)
        made.append(Made(1, sample, make_train(random, sample, 0.1), 0, -1, 0, 0, 3))
    write_run(tmp_path, made)
    check(tmp_path, rows_of(tmp_path))


@given(st.lists(st.lists(st.sampled_from([0, 1, 9, 17]), max_size=12), min_size=1, max_size=4))
def test_verifications_never_cross_sequences(sequences: list[list[int]]) -> None:
    start = np.cumsum([0, *map(len, sequences)])
    part: Any = type("Part", (), {"numbers": {"prompt_length": np.zeros(len(sequences), np.uint32)}})
    found = rounds_of(Block(part, 0, len(sequences), start, {"flags": np.array([flag for flags in sequences for flag in flags], np.uint8)}))
    expected = [(row, first, int(start[row]) + last, drafts, ended) for row, flags in enumerate(sequences) for first, last, drafts, ended in walk(flags)]
    assert list(zip(found.row.tolist(), found.position.tolist(), found.last.tolist(), found.accepted.tolist(), found.ended.tolist(), strict=True)) == expected


def test_counts_of_samples_where_tokens_have_no_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random, made = np.random.default_rng(0), []
    for draw in range(3):
        sample = make_sample(random, draw, 0, 4, 20, 3, metadata={"spec_info": {"completion_token_num": 20, "spec_verify_ct": 5 + draw, "spec_accept_token_num": 15, "spec_draft_token_num": 30}})
        made.append(Made(1 + draw % 2, sample, make_train(random, sample, 0.1), 0, -1, 0, 0, 3))
    write_run(tmp_path, made)
    found = speculative(tmp_path)
    assert found["total"] is None
    assert [(row["step"], row["accept_length"], row["accepted_share"]) for row in found["reported_by_samples"]] == [(1, 40 / 12, 0.5), (2, 20 / 6, 0.5)]
    assert script("speculative", tmp_path) == 0
    assert "accept length 3.333, as samples report" in capsys.readouterr().out


def test_nothing_drafted_is_no_result(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sample = make_sample(random, 0, 0, 4, 20, 3)
    write_run(tmp_path, [Made(1, sample, make_train(random, sample, 0.1), 0, -1, 0, 0, 3)])
    with pytest.raises(UserError, match="none of 20 generated tokens was drafted"):
        speculative(tmp_path)


def test_the_tool_tells_and_draws(lively: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = lively
    assert script("speculative", folder, "--html", tmp_path / "page.html") == 0
    assert "by weight version" in capsys.readouterr().out
    assert "Accept length along the response" in (tmp_path / "page.html").read_text()


def test_plant_is_what_is_walked(tmp_path: Path) -> None:
    """Accepted and own tokens of the walk are the generator's, so that the marks are read as they were meant."""
    planted = plant(tmp_path, "clean", 0.0, 2, steps=1, sequences=16, response=40)
    assert speculative(tmp_path)["total"]["tokens"] == int((planted.generated.accepted | planted.generated.resampled).sum())
