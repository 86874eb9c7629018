"""Groups in memory and in the journal come out alike; a long journal is shortened without losing what is not sealed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from miles.data.sample import Sample
from miles.data.store.epoch import new_epoch
from miles.data.store.journal import read_group, read_journal
from miles.data.store.run_dir import RunDir
from miles.data.store.shard import write_shard
from miles.rollout import held
from miles.rollout.held import Held, size_of

JOB = {"kind": "rollout", "step": 3, "weight_version": 2, "weight_checksum": "aa"}
NEXT = JOB | {"step": 4}
SAMPLES = {"rollout": 2, "eval": 1, "sft": 1}


def group(draw: int, length: int = 6) -> list[Sample]:
    return [
        Sample(draw, i, 9, np.arange(length, dtype=np.int32) + draw, 2, np.full(length, -0.25, np.float32), np.ones(length, np.uint8), np.ones(length, np.uint8))
        for i in range(SAMPLES["rollout"])
    ]


def names(samples: list[Sample]) -> list[tuple[int, int, bytes]]:
    return [(s.draw, s.sample, s.token_id.tobytes()) for s in samples]


@pytest.mark.parametrize("budget", [0, size_of(group(0)), 1 << 20])
def test_memory_or_journal(tmp_path: Path, budget: int) -> None:
    made = Held(RunDir(tmp_path), 0, 1, SAMPLES, budget)
    for draw in (5, 3, 4, 8):
        made.add(JOB, group(draw), hold=draw != 8)
    made.add(NEXT, group(9), hold=True)
    taken = made.take(JOB, [3, 5])
    assert len(taken) == 4
    assert names(list(taken)) == names([*group(3), *group(5)])
    assert names(taken[1:3]) == names([group(3)[1], group(5)[0]])
    assert names(list(made.take(NEXT, [9]))) == names(group(9))


def test_a_long_journal_is_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "SHORTEN_BYTES", 10)
    made = Held(RunDir(tmp_path), 0, new_epoch(RunDir(tmp_path)), SAMPLES, budget=0)
    for draw in range(50):
        made.add(JOB, group(draw), hold=True)
    made.add(NEXT, group(90), hold=True)
    made.add(NEXT, group(91), hold=True)
    path = RunDir(tmp_path).journal_file(0, 1)
    before = path.stat().st_size
    list(made.take(JOB, list(range(50))))
    made.begin(JOB | {"kind": "eval", "step": 9})  # of another kind: it says nothing about the rollout's manifest
    assert path.stat().st_size == before
    made.begin(NEXT)
    assert path.stat().st_size < before / 10
    assert names(list(made.take(NEXT, [91, 90]))) == names([*group(91), *group(90)])


def test_a_death_between_shard_and_manifest_loses_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker has sealed its shard, the service has not sealed the manifest: the next attempt is asked for the same step again."""
    monkeypatch.setattr(held, "SHORTEN_BYTES", 10)
    first = Held(RunDir(tmp_path), 0, 1, SAMPLES)
    first.begin(JOB)
    for draw in range(4):
        first.add(JOB, group(draw), hold=draw != 1)  # a filter dropped draw 1
    write_shard(tmp_path / "rollout.0.h5", first.take(JOB, [0, 2]))
    first.close()
    second = Held(RunDir(tmp_path), 0, 2, SAMPLES)
    second.begin(JOB)
    found = second.recall(JOB)
    assert sorted(found) == [0, 1, 2, 3]
    assert names(read_group(*found[2])) == names(group(2))


def test_groups_of_several_sealed_steps_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal that becomes long later forgets all steps that have passed."""
    made = Held(RunDir(tmp_path), 0, new_epoch(RunDir(tmp_path)), SAMPLES)
    for step in (3, 4, 5):
        made.begin(JOB | {"step": step})
        made.add(JOB | {"step": step}, group(step), hold=True)
        if step < 5:
            made.take(JOB | {"step": step}, [step])
    monkeypatch.setattr(held, "SHORTEN_BYTES", 10)
    made.take(JOB | {"step": 5}, [5])
    made.begin(JOB | {"step": 6})
    made.add(JOB | {"step": 6}, group(6), hold=True)
    assert [context["step"] for context, _ in read_journal(RunDir(tmp_path).journal_file(0, 1))] == [6]


def test_recall_is_for_the_same_job_only(tmp_path: Path) -> None:
    first = Held(RunDir(tmp_path), 0, 1, SAMPLES)
    first.add(JOB, group(1), hold=True)
    first.add(JOB, group(2)[:1], hold=True)  # of a run with one sample a prompt
    first.add(JOB | {"weight_checksum": "bb"}, group(3), hold=True)
    first.close()
    with RunDir(tmp_path).journal_file(0, 1).open("ab") as file:
        file.write(b"torn")
    second = Held(RunDir(tmp_path), 0, 2, SAMPLES)
    found = second.recall(JOB)
    assert list(found) == [1]
    assert names(read_group(*found[1])) == names(group(1))
    assert second.recall(NEXT) == {}
    assert list(second.recall(JOB | {"weight_checksum": "bb"})) == [3]


def test_a_recalled_group_is_not_journalled_again(tmp_path: Path) -> None:
    """In memory or, beyond the budget, where the older journal has it."""
    first = Held(RunDir(tmp_path), 0, 1, SAMPLES)
    first.add(JOB, group(1), hold=True)
    first.close()
    for epoch, budget in ((2, 1 << 20), (3, 0)):
        later = Held(RunDir(tmp_path), 0, epoch, SAMPLES, budget)
        place = later.recall(JOB)[1]
        later.add(JOB, read_group(*place), place, hold=True)
        later.add(JOB, group(epoch), hold=True)
        assert names(list(later.take(JOB, [1, epoch]))) == names([*group(1), *group(epoch)])
        assert [context_group[1][0].draw for context_group in read_journal(RunDir(tmp_path).journal_file(0, epoch))] == [epoch]
        later.close()
