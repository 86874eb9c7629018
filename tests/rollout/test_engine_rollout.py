"""Service, worker and the embedded engine as processes: samples as FORMATS wants them, the same whoever makes them and when."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash

from miles.data.sample import Flag, Sample, Status
from miles.data.store.manifest import read_manifest
from miles.data.store.routes import open_routes
from miles.data.store.shard import open_shard
from miles.recipes.quickstart import build_tiny


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_tiny(folder, 1)
    return folder


def samples_of(folder: Path) -> list[Sample]:
    manifest = read_manifest(folder)
    with open_shard(folder / manifest.shards[0].name) as shard:
        return shard.samples()


def same(left: list[Sample], right: list[Sample]) -> bool:
    """Equal tokens, log-probs to the bit, rewards and names."""
    keys = [[(s.draw, s.sample, s.seed, s.token_id.tobytes(), s.rollout_logprob.tobytes(), s.reward, s.status) for s in side] for side in (left, right)]
    return keys[0] == keys[1]


def test_a_batch_from_the_engine(attempts, tiny_model: Path) -> None:
    overrides = (f"model.hf_checkpoint={tiny_model}", "rollout.return_routed_experts=true", "rollout.sampling.max_prompt_len=32")
    first = attempts(*overrides, model=tiny_model).start("service", "worker", "engine")
    folder = first.batch("rollout", 3, seconds=120, next_draw=0)
    manifest, samples = read_manifest(folder), samples_of(folder)
    eos = json.loads((tiny_model / "config.json").read_text())["eos_token_id"]
    assert [(s.draw, s.sample) for s in samples] == [(draw, index) for draw in range(4) for index in range(4)]
    assert manifest.engines[0]["engine"] == "miles"
    assert manifest.policy.weight_checksum == "w3"
    for s in samples:
        assert s.seed == xxhash.xxh3_64_intdigest(struct.pack("<QQII", 1234, s.draw, s.sample, 0)) >> 1
        assert 1 <= s.response_length <= 6
        generated = np.arange(len(s.token_id)) >= s.prompt_length
        assert np.isnan(s.rollout_logprob[~generated]).all()
        assert (s.rollout_logprob[generated] <= 0).all()
        assert s.loss_mask.tolist() == generated.astype(int).tolist()
        assert ((s.flags & Flag.GENERATED) != 0).tolist() == generated.tolist()
        assert np.flatnonzero(s.flags & Flag.FIRST_OF_TURN).tolist() == [s.prompt_length]
        assert s.runs == [(s.prompt_length, 2)]
        assert s.status == (Status.COMPLETED if s.token_id[-1] == eos else Status.TRUNCATED)
        assert s.response_length == 6 or s.status == Status.COMPLETED
        assert s.prompt == f"1 + {s.draw} ="
        assert s.reward == float((s.response or "").strip() == s.label)
    assert len({s.token_id.tobytes() for s in samples if s.draw == 0}) > 1  # samples of a draw differ
    with open_routes(folder / manifest.routes[0].name) as routes:
        experts = routes.experts(0, 1)[0]
        assert experts.shape == (len(samples[0].token_id) - 1, 2, 2)
        assert experts.dtype == np.uint8
        assert experts.max() < 4
    greedy = samples_of(first.batch("eval", 2, seconds=60))
    assert len(greedy) == 10
    first.kill()

    # Other arrival times and another company in the engine: the same bits, other weights' checksum or not.
    second = attempts(model=tiny_model)
    path = second.run.path / "run.yaml"
    path.write_text(path.read_text().replace("max_concurrency: 16", "max_concurrency: 4"))
    second.start("service", "worker", "engine")
    again = second.batch("rollout", 3, seconds=120, next_draw=0, weight_checksum="other")
    assert again == folder
    assert read_manifest(again).policy.weight_checksum == "other"
    assert same(samples_of(again), samples)

    # The engine dies: the worker tries a few times, then leaves with 75 and says so.
    second.kill("engine")
    second.post("/batch", job={"kind": "rollout", "step": 4, "weight_version": 3, "weight_checksum": "x", "next_draw": 4})
    assert second.code("worker") == 75
    assert "failed 4 times" in second.log("worker").read_text()
    assert second.code("service") == 75


def test_what_the_engine_refuses_is_a_line_for_the_user(attempts, tiny_model: Path) -> None:
    attempt = attempts(f"model.hf_checkpoint={tiny_model}", "rollout.sampling.max_response_len=4000", model=tiny_model).start("service", "worker", "engine")
    attempt.post("/batch", job={"kind": "rollout", "step": 3, "weight_version": 2, "weight_checksum": "x", "next_draw": 0})
    assert attempt.code("worker", 60) == 78
    log = attempt.log("worker").read_text()
    assert "the engine refuses the request" in log
    assert "maximum context length" in log
    assert "lower max_response_len of its sampling section" in log
    assert "Traceback" not in log
