"""Rollout nodes that come and go (placement jobs): numbers, who may generate, who is turned away."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from miles.config.compose import load_config
from miles.data.prompts import load_prompts
from miles.data.store.epoch import new_epoch
from miles.data.store.run_dir import RunDir
from miles.rollout.guests import Guests, Stale
from miles.rollout.jobs import Job
from miles.rollout.service import RolloutService


def test_a_number_is_never_given_twice() -> None:
    guests = Guests(planned=2)
    assert [guests.number(0, "a"), guests.number(1, "b")] == [0, 1]
    guests.lose("a", "silent")
    assert guests.number(0, "c") == 2
    assert guests.number(0, "c") == 2, "the same one asks again"
    assert guests.number(1, "d") == 3
    assert Guests(planned=2).number(1, "e") == 1


@pytest.fixture
def service(tmp_path: Path) -> RolloutService:
    words = ["cluster.placement=jobs", "rollout.num_gpus=2", "cluster.groups.rollout.gpus_per_node=1"]
    config, run = load_config(["recipes/tiny"], words), RunDir(tmp_path)
    return RolloutService(config, run, new_epoch(run), load_prompts(config), silence=60.0)


def ask(service: RolloutService, worker: int, place: str, **report: Any) -> dict[str, Any]:
    return asyncio.run(service.work({"worker": worker, "place": place, "idle": 100, "wait": 0, **report}))


def arrive(service: RolloutService, node: int, place: str, url: str) -> int:
    service.register("engine", node, place=place, url=url)
    return service.register("worker", node, place=place, engines=1)


def test_only_engines_that_hold_the_weights_are_given_draws(service: RolloutService) -> None:
    job = Job("rollout", 3, weight_version=2, weight_checksum="aa", next_draw=0)
    arrive(service, 0, "first", "http://a")
    service.sync("aa", ["http://a"], [])
    service.jobs["rollout", 3] = service._begin(job)
    arrive(service, 1, "late", "http://b")
    assert ask(service, 1, "late")["draws"] == []
    assert service.new_engines() == ["http://b"]
    service.sync("aa", ["http://b"], [])
    assert service.new_engines() == []
    (given,) = ask(service, 1, "late")["draws"]
    assert [draw["draw"] for draw in given["draws"]] == [0, 1], "its even share"
    service.register("engine", 1, place="late", url="http://a")
    assert service.new_engines() == ["http://a"], "another engine at an address that was known"
    assert ask(service, 0, "first")["draws"] == []


def test_who_was_given_up_is_turned_away_and_others_are_told_whose_draws_they_have(service: RolloutService) -> None:
    job = Job("rollout", 3, weight_version=2, weight_checksum="aa", next_draw=0)
    for node, place, url in ((0, "first", "http://a"), (1, "second", "http://b")):
        arrive(service, node, place, url)
    service.sync("aa", ["http://a", "http://b"], [])
    service.jobs["rollout", 3] = service._begin(job)
    assert [draw["draw"] for draw in ask(service, 0, "first")["draws"][0]["draws"]] == [0, 1]
    service.heartbeat("worker", 0, "first")
    service.heard["worker", 0] -= 61
    service.watch()
    assert service.end is None
    assert service.notices == ["rollout node first left (worker 0 was silent for 60 s); what it had not finished goes to others"]
    for call in (lambda: ask(service, 0, "first"), lambda: service.heartbeat("engine", 0, "first"), lambda: service._give(0, "first", 100)):
        with pytest.raises(Stale, match="was given up"):
            call()
    (given,) = ask(service, 1, "second")["draws"]
    assert [draw["draw"] for draw in given["draws"]] == [0, 1, 2, 3]
    assert given["lost"] == [0]
    service.sync("bb", [], ["http://b"])
    assert service.guests is not None
    assert set(service.guests.lost) == {"first", "second"}


def test_a_trainer_that_falls_silent_ends_the_attempt_also_here(service: RolloutService) -> None:
    service.register("trainer", 0, place="train", node="node3")
    service.heartbeat("trainer", 0, "train")
    service.heard["trainer", 0] -= 61
    service.watch()
    assert service.end is not None
    assert (service.end.code, service.end.culprit) == (75, {"role": "trainer", "rank": 0, "node": "node3"})


def test_a_worker_that_fails_leaves_and_one_whose_user_is_wrong_ends_the_run(service: RolloutService) -> None:
    arrive(service, 0, "first", "http://a")
    arrive(service, 1, "second", "http://b")
    with pytest.raises(Stale):
        ask(service, 0, "first", failed={"message": "engine http://a failed 4 times", "user_fault": False, "again": True})
    assert service.end is None
    with pytest.raises(Exception, match="filter broke"):
        ask(service, 1, "second", failed={"message": "filter broke", "user_fault": True, "again": False})
    assert service.end is not None
    assert service.end.code == 78
