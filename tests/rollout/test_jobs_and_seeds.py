"""Pure parts: rounds of a batch, seeds, accuracy's interval, filters, frozen signatures."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random

import numpy as np
import pytest
import xxhash

from miles.config.exits import UserError
from miles.config.schema import RunConfig
from miles.data.sample import Sample, Status
from miles.recipes.quickstart import demonstrations
from miles.rollout import builtin_rewards, filters, generate
from miles.rollout.draws import EVAL_BASE, SFT_BASE, first_draw, number_in_source, sampling_seed
from miles.rollout.evaluate import summarise, wilson
from miles.rollout.jobs import BatchJob, Finished, Job, Part, ShardReport

SHARD = ShardReport({}, None, [], [], [])


def finished(draw: int, dropped: str | None = None, worker: int = 0) -> Finished:
    return Finished(draw, worker, 4, 20, 0.5, dropped)


@pytest.mark.parametrize("seed", range(5))
def test_the_batch_does_not_depend_on_who_is_fast(seed: int) -> None:
    order = random.Random(seed)
    batch = BatchJob(Job("rollout", 1), first=10, needed=3, again=4, data_rows=100)
    under_way: list[tuple[int, int]] = []
    while not batch.orders:
        worker = order.randrange(2)
        under_way += [(draw, worker) for draw in batch.take(worker, order.randrange(1, 3))]
        order.shuffle(under_way)
        for draw, who in under_way[: order.randrange(3)]:
            batch.finish(finished(draw, None if draw % 2 else "even", who))
        under_way = [(draw, who) for draw, who in under_way if draw not in batch.finished]
    assert sorted(draw for draws in batch.orders.values() for draw in draws) == [11, 13, 15]
    assert batch.next_draw == 18
    assert batch.dropped() == [{"draw": d, "why": "surplus" if d == 17 else "even"} for d in (10, 12, 14, 16, 17)]


def test_a_report_told_twice_or_by_a_stranger_counts_once() -> None:
    batch = BatchJob(Job("rollout", 1), 0, 2, 2, 10)
    assert batch.take(0, 1) == [0]
    batch.finish(finished(1))  # never handed out
    batch.finish(finished(0, worker=7))  # not its worker
    assert not batch.finished
    batch.finish(finished(0))
    batch.finish(finished(0, "changed its mind"))
    assert batch.finished[0].dropped is None
    assert batch.take(1, 5) == [1]
    batch.finish(finished(1, worker=1))
    assert batch.orders == {Part(0, 0): [0], Part(1, 0): [1]}
    assert batch.orders_for(0) == [(Part(0, 0), [0])]
    assert batch.orders_for(0) == []
    assert not batch.complete
    for worker in (0, 1):
        batch.shards[Part(worker, 0)] = SHARD
    assert batch.complete
    assert batch.dropped() == []


def test_each_worker_has_its_even_share_at_most() -> None:
    batch = BatchJob(Job("rollout", 1), 0, 8, 8, 10)
    assert [batch.share(worker, 3) for worker in range(3)] == [3, 3, 3]
    batch.take(0, 3)
    assert [batch.share(worker, 3) for worker in range(3)] == [0, 3, 3]
    for draw in (0, 1, 2):
        batch.finish(finished(draw))
    assert [batch.share(worker, 3) for worker in range(3)] == [2, 2, 2], "5 are left"


def test_what_a_lost_worker_had_goes_to_others() -> None:
    batch = BatchJob(Job("rollout", 1), first=0, needed=3, again=6, data_rows=100)
    assert batch.take(0, 3) == [0, 1, 2]
    batch.finish(finished(0))
    batch.finish(finished(1, "zero_std"))
    batch.lose(0)
    assert list(batch.pending) == [0, 2, 3, 4, 5], "what it had finished, too: nobody else holds it; what a filter dropped is settled"
    assert batch.take(1, 9) == [0, 2, 3, 4, 5]
    batch.finish(finished(2, worker=0))  # it lives after all
    assert 2 not in batch.finished
    assert batch.lost == {0: {0}, 2: {0}}
    for draw in (0, 2, 3, 4, 5):
        batch.finish(finished(draw, worker=1))
    assert batch.orders == {Part(1, 0): [0, 2, 3]}
    assert [each["draw"] for each in batch.dropped()] == [1, 4, 5]


def test_a_sealed_part_outlives_its_worker_and_an_order_does_not() -> None:
    batch = BatchJob(Job("rollout", 1), first=0, needed=4, again=4, data_rows=100)
    for worker in (0, 1):
        for draw in batch.take(worker, 2):
            batch.finish(finished(draw, worker=worker))
    for worker in (0, 1):
        assert len(batch.orders_for(worker)) == 1
    batch.shards[Part(0, 0)] = SHARD
    batch.lose(0)
    assert not batch.pending
    batch.lose(1)
    assert batch.take(2, 1) == [2]
    assert batch.take(3, 1) == [3]
    batch.finish(finished(3, "the filter thinks otherwise now", worker=3))
    batch.finish(finished(2, worker=2))
    assert batch.orders == {Part(0, 0): [0, 1], Part(2, 0): [2], Part(3, 0): [3]}, "the batch was chosen"
    assert not batch.complete
    batch.shards |= {Part(2, 0): SHARD, Part(3, 0): SHARD}
    assert batch.complete
    assert batch.dropped() == []


def test_who_has_sealed_already_seals_a_lost_workers_share_apart() -> None:
    batch = BatchJob(Job("rollout", 1), first=0, needed=2, again=2, data_rows=100)
    for worker in (0, 1):
        for draw in batch.take(worker, 1):
            batch.finish(finished(draw, worker=worker))
    assert batch.orders_for(0) == [(Part(0, 0), [0])]
    batch.lose(1)
    assert batch.take(0, 1) == [1]
    batch.finish(finished(1, worker=0))
    assert batch.orders_for(0) == [(Part(0, 1), [1])]
    assert [part.name for part in batch.orders] == ["0", "0-1"]


def test_a_filter_that_drops_everything_ends_the_run() -> None:
    batch = BatchJob(Job("rollout", 7), 0, 2, 2, 6)
    for draw in (0, 1, 2, 3, 4, 5, 6):
        assert draw in batch.take(0, 1)
        batch.finish(finished(draw, "zero_std_0"))
    batch.take(0, 1)
    with pytest.raises(UserError, match=r"step 7: the filter dropped all of 8 groups \(zero_std_0\)"):
        batch.finish(finished(7, "zero_std_0"))
    assert len(batch.finished) == 8


def test_a_job_ignores_what_does_not_concern_its_kind() -> None:
    asked = {"step": 2, "weight_version": 9, "weight_checksum": "aa", "next_draw": 5, "later": True}
    assert Job.parse({"kind": "sft", **asked}) == Job("sft", 2)
    assert Job.parse({"kind": "rollout", **asked}) == Job("rollout", 2, 9, "aa", 5)
    assert Job.parse({"kind": "eval", **asked}) == Job("eval", 2, 9, "aa")


def test_draw_numbers_are_never_shared() -> None:
    sft = [first_draw("sft", step, 64, 1000) for step in (1, 2, 3)]
    assert sft == [SFT_BASE, SFT_BASE + 64, SFT_BASE + 128]
    assert [number_in_source("sft", draw, 1000) for draw in sft] == [0, 64, 128]
    evaluations = [first_draw("eval", step, 10, 10) for step in (0, 3)]
    assert evaluations == [EVAL_BASE, EVAL_BASE + 30]
    assert number_in_source("eval", EVAL_BASE + 37, 10) == 7
    assert first_draw("rollout", 4, 8, 10) == 0


def test_seeds_as_documented() -> None:
    key = (1234).to_bytes(8, "little") + (70).to_bytes(8, "little") + (3).to_bytes(4, "little") + (1).to_bytes(4, "little")
    assert sampling_seed(1234, 70, 3, 1) == xxhash.xxh3_64_intdigest(key) // 2
    seeds = {sampling_seed(s, d, i, t) for s in (0, 1) for d in (0, 1, EVAL_BASE) for i in range(4) for t in range(3)}
    assert len(seeds) == 72
    assert max(seeds) < 2**63
    assert sampling_seed(-5, 0, 0, 0) >= 0


def test_wilson_against_tables() -> None:
    """Newcombe 1998, table I: 81 of 263 and 15 of 148, 0 of 20, 1 of 29."""
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson(right / n, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(math.nan, 0) == (0.0, 1.0)


def made(draw: int, index: int, reward: float, length: int = 5, status: Status = Status.COMPLETED) -> Sample:
    zeros = np.zeros(length, np.uint8)
    return Sample(draw, index, 0, np.zeros(length, np.int32), 2, np.zeros(length, np.float32), zeros, zeros, status, reward)


def test_summary_of_an_evaluation() -> None:
    samples = [made(d, i, float(d < 3 or i == 0), 4 + d, Status.TRUNCATED if d == 3 else Status.COMPLETED) for d in range(4) for i in range(2)]
    found = summarise(samples)
    assert found["eval/accuracy"] == pytest.approx(7 / 8)  # 1, 1, 1 and a half
    assert (found["eval/n"], found["eval/truncated_ratio"]) == (4, 0.25)
    assert found["eval/accuracy_low"] < 7 / 8 < found["eval/accuracy_high"]
    assert found["eval/response_len/mean"] == pytest.approx(3.5)
    assert found["eval/reward"] == pytest.approx(7 / 8)
    with pytest.raises(ValueError, match="without samples"):
        summarise([])


def test_filters() -> None:
    alike, apart = [made(0, i, 1.0) for i in range(3)], [made(0, i, float(i)) for i in range(3)]
    assert filters.check_reward_nonzero_std(apart) is True
    assert filters.check_reward_nonzero_std(alike) == "zero_std_1"
    assert filters.check_no_aborted([made(0, 0, 0.0, status=Status.ABORTED)]) == "aborted"
    assert filters.reason_to_drop(lambda group: np.bool_(False), alike) == "filtered"
    assert filters.reason_to_drop(lambda group: True, alike) is None
    with pytest.raises(TypeError, match="not NoneType"):
        filters.reason_to_drop(lambda group: None, alike)  # type: ignore[arg-type, return-value]


def test_signatures_of_user_functions_are_frozen() -> None:
    """What users write their functions against. A change here breaks them: it needs an entry in the changelog."""
    assert str(inspect.signature(generate.generate)) == "(draw: 'Draw', sample: 'int', context: 'GenerateContext') -> 'Sample'"
    assert inspect.iscoroutinefunction(generate.generate)
    for function in (builtin_rewards.exact_match, builtin_rewards.math, builtin_rewards.reasoning_gym, builtin_rewards.remote_rm):
        assert str(inspect.signature(function)) == "(samples: 'list[Sample]', context: 'RewardContext') -> 'list[Score]'"
    for function in (filters.check_reward_nonzero_std, filters.check_no_aborted):
        assert str(inspect.signature(function)) == "(group: 'list[Sample]') -> 'bool | str'"
    assert list(inspect.signature(demonstrations).parameters) == ["prompt", "label", "metadata"]
    public = [field.name for field in dataclasses.fields(generate.GenerateContext) if not field.name.startswith("_")]
    assert public == ["config", "kind", "sampling", "tokenizer", "engines", "weight_version", "route_shape", "route_dtype"]
    assert [field.name for field in dataclasses.fields(builtin_rewards.RewardContext)] == ["draw", "options", "config", "http", "calls"]
    for name, parameters in {"prompt": ["draw"], "seed": ["draw", "sample", "turn"], "sampling_params": ["seed", "length"]}.items():
        assert list(inspect.signature(getattr(generate.GenerateContext, name)).parameters)[1:] == parameters


def test_a_context_bounds_the_response() -> None:
    config = RunConfig(rollout={"sampling": {"max_response_len": 10, "max_context_len": 14, "temperature": 0.7, "stop": ["#"]}})
    context = generate.GenerateContext(config, "rollout", config.rollout.sampling, None, None, 0)  # type: ignore[arg-type]
    assert [context.sampling_params(1, length)["max_new_tokens"] for length in (2, 4, 5, 13)] == [10, 10, 9, 1]
    given = context.sampling_params(99, 2)
    assert (given["sampling_seed"], given["temperature"], given["stop"], given["top_k"], given["no_stop_trim"]) == (99, 0.7, ["#"], -1, True)
    with pytest.raises(UserError, match=r"14 tokens fill sampling.max_context_len 14"):
        context.sampling_params(1, 14)
