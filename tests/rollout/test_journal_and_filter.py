"""A killed worker loses no finished group; a filter's batch does not depend on who was fast."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest

from miles.data.store.manifest import read_manifest
from miles.data.store.shard import open_shard

SCRIPTED = "rollout.generate_path=scripted.generate"
BY_ITSELF = "rollout.reward.type=null"


def tokens_of(folder: Path) -> list[tuple[int, int, list[int], float]]:
    manifest = read_manifest(folder)
    found = []
    for entry in manifest.shards:
        with open_shard(folder / entry.name) as shard:
            found += [(s.draw, s.sample, s.token_id.tolist(), s.reward) for s in shard.samples()]
    return found


@pytest.mark.parametrize("killed", [("worker",), ("service",)])
def test_groups_in_the_journal_are_not_generated_again(attempts, tmp_path: Path, killed: tuple[str, ...]) -> None:
    calls, gate = tmp_path / "calls", tmp_path / "gate"
    environment = {"CALLS": str(calls), "GATE": str(gate)}
    first = attempts("rollout.generate_path=scripted.generate_until_gate", BY_ITSELF, environment=environment).start()
    job = {"kind": "rollout", "step": 3, "weight_version": 2, "weight_checksum": "aa", "next_draw": 0}
    first.post("/batch", job=job)
    first.wait_for(lambda: first.status().get("groups_done") == 2)
    first.kill(*killed)
    first.kill()
    gate.touch()
    first.run.checkpoint(5).mkdir(parents=True)
    (first.run.checkpoint(5) / "COMPLETE").touch()  # damaged: the trainer passes over it, and the journal is as it was
    second = attempts(environment=environment).start()
    folder = second.batch("rollout", 3, weight_version=2, weight_checksum="aa", next_draw=0)
    count = collections.Counter(calls.read_text().split())
    assert {f"{draw}.{sample}" for draw in (0, 1) for sample in range(4)} <= {name for name, times in count.items() if times == 1}
    assert read_manifest(folder).parent_checkpoint is None
    rows = tokens_of(folder)
    assert [(draw, sample) for draw, sample, _, _ in rows] == [(draw, sample) for draw in range(4) for sample in range(4)]
    # Other weights: nothing in the journal counts.
    second.kill()
    third = attempts(environment=environment).start()
    again = third.batch("rollout", 3, weight_version=2, weight_checksum="bb", next_draw=0)
    assert collections.Counter(calls.read_text().split())["0.0"] == 2
    assert tokens_of(again) == rows  # the seed depends on run, draw and sample alone


@pytest.mark.parametrize("slow", ["0", "0.3"])
def test_a_filter_takes_groups_in_draw_order(attempts, slow: str) -> None:
    overrides = (SCRIPTED, BY_ITSELF, "rollout.filter_path=scripted.keep_some", "rollout.over_sampling_batch_size=5")
    attempt = attempts(*overrides, environment={"SLOW": slow}).start()
    manifest = read_manifest(attempt.batch("rollout", 3, next_draw=0))
    assert manifest.draws == [1, 4, 7, 10]
    assert manifest.next_draw == 15
    whys = {dropped.draw: dropped.why for dropped in manifest.dropped}
    assert whys == {0: "draw_mod_0", 2: "draw_mod_2", 3: "draw_mod_0", 5: "draw_mod_2", 6: "draw_mod_0", 8: "draw_mod_2",
                    9: "draw_mod_0", 11: "draw_mod_2", 12: "draw_mod_0", 13: "surplus", 14: "draw_mod_2"}  # fmt: skip
    following = read_manifest(attempt.batch("rollout", 4, next_draw=manifest.next_draw))
    assert following.draws == [16, 19, 22, 25]


def test_an_evaluation_takes_every_prompt(attempts) -> None:
    attempt = attempts(SCRIPTED, BY_ITSELF, "eval.n_samples_per_prompt=2").start()
    folder = attempt.batch("eval", 6)
    assert folder == attempt.run.eval(6)
    manifest = read_manifest(folder)
    assert (manifest.kind, manifest.sequences, manifest.assignment) == ("eval", 20, [])
    with open_shard(folder / manifest.shards[0].name) as shard:
        samples = shard.samples()
    assert sorted({s.prompt for s in samples}) == sorted(f"2 + {number} =" for number in range(10))
    assert all(s.source == "eval" for s in samples)
    assert set(manifest.draws).isdisjoint(read_manifest(attempt.batch("eval", 9)).draws)  # never the same number twice in a run
    assert np.array_equal(sorted(manifest.draws), manifest.draws)
