"""Which steps a run has: worked out by hand."""

from __future__ import annotations

from typing import Any

from miles.config.schema import RunConfig
from miles.run.schedule import steps


def config(**fields: Any) -> RunConfig:
    return RunConfig.model_validate(fields)


def test_warm_start_comes_first_and_steps_count_through() -> None:
    run = config(num_rollout=3, warm_start={"steps": 2})
    assert run.total_steps == 5
    found = list(steps(run, 0))
    assert [step.number for step in found] == [1, 2, 3, 4, 5]
    assert [step.kind for step in found] == ["sft", "sft", "rollout", "rollout", "rollout"]
    assert [step.number_in_phase for step in found] == [0, 1, 0, 1, 2]
    assert [step.first_rollout for step in found] == [False, False, True, False, False]


def test_end_of_warm_start_and_last_step_are_saved() -> None:
    assert [step.number for step in steps(config(num_rollout=3, warm_start={"steps": 2}), 0) if step.save] == [2, 5]
    run = config(num_rollout=5, warm_start={"steps": 1}, checkpoint={"save_interval": 2})
    assert [step.number for step in steps(run, 0) if step.save] == [1, 3, 5, 6]


def test_evaluation_counts_rollouts_and_includes_the_last() -> None:
    assert [step.number for step in steps(config(num_rollout=5, warm_start={"steps": 4}, eval={"interval": 2}), 0) if step.evaluate] == [6, 8, 9]
    assert not any(step.evaluate for step in steps(config(num_rollout=5), 0))


def test_a_resumed_run_has_the_remaining_steps_of_the_whole() -> None:
    run = config(num_rollout=7, warm_start={"steps": 3}, eval={"interval": 2}, checkpoint={"save_interval": 3})
    whole = list(steps(run, 0))
    for trained in range(len(whole) + 1):
        assert list(steps(run, trained)) == whole[trained:]


def test_a_run_that_stops_early_has_the_steps_of_the_whole_and_saves_the_last_of_them() -> None:
    fields: dict[str, Any] = {"num_rollout": 7, "warm_start": {"steps": 3}, "eval": {"interval": 2}, "checkpoint": {"save_interval": 3}}
    whole, early = config(**fields), config(**fields, debug={"stop_after": 5})
    assert (early.total_steps, early.last_step) == (10, 5)
    found = list(steps(early, 0))
    assert [(step.number, step.evaluate) for step in found] == [(step.number, step.evaluate) for step in steps(whole, 0)][:5]
    assert [step.number for step in found if step.save] == [3, 5]
    assert not list(steps(early, 5))
    assert list(steps(config(**fields, debug={"stop_after": 99}), 0)) == list(steps(whole, 0))
