"""Service and worker as processes: warm-start batches end to end, lineage, auth, fencing, ends."""

from __future__ import annotations

import json
import socket
import time

import httpx
import numpy as np
import pytest

from miles.data.store.manifest import read_manifest
from miles.data.store.shard import open_shard


def test_warm_start_batches_hold_what_is_to_be_learnt(attempts) -> None:
    attempt = attempts().start()
    eos = json.loads((attempt.model / "config.json").read_text())["eos_token_id"]
    folders = [attempt.batch("sft", step, parent_checkpoint="step_000000") for step in (1, 2)]
    prompts = []
    for step, folder in enumerate(folders, 1):
        manifest = read_manifest(folder)
        assert (manifest.kind, manifest.step, manifest.epoch, manifest.sequences) == ("sft", step, attempt.epoch, 16)
        assert manifest.policy.weight_checksum == ""
        assert manifest.parent_checkpoint == "step_000000"
        assert manifest.draws == sorted(manifest.draws)
        assert len(set(manifest.draws)) == 16
        assert sum(b - a for steps in manifest.assignment for rank in steps for micro in rank for _, a, b in micro) == 16
        (entry,) = manifest.shards
        with open_shard(folder / entry.name) as shard:
            for sample in shard.samples():
                left, right = sample.prompt.removesuffix(" =").split(" + ")
                assert sample.response == sample.label == str(int(left) + int(right))
                assert np.isnan(sample.rollout_logprob).all()
                assert sample.loss_mask.tolist() == [0] * sample.prompt_length + [1] * sample.response_length
                assert sample.token_id[-1] == eos
                prompts.append(sample.prompt)
    assert prompts == [f"0 + {number} =" for number in range(32)]
    assert read_manifest(folders[1]).draws[0] == read_manifest(folders[0]).next_draw


def test_a_batch_on_disk_is_used_again_and_an_alien_one_is_set_aside(attempts) -> None:
    first = attempts("rollout.generate_path=scripted.generate", "rollout.reward.type=null").start()
    before = first.batch("rollout", 3, weight_checksum="aaaa", next_draw=0)
    content = (before / "manifest.json").read_bytes()
    first.kill()
    second = attempts().start()
    assert second.batch("rollout", 3, weight_checksum="aaaa", next_draw=0) == before
    assert (before / "manifest.json").read_bytes() == content
    second.batch("rollout", 3, weight_checksum="bbbb", next_draw=0)
    assert read_manifest(before).policy.weight_checksum == "bbbb"
    (aside,) = before.parent.glob("step_000003.aside.*")
    assert (aside / "manifest.json").read_bytes() == content


def test_the_next_draw_goes_on_from_the_batch_before(attempts) -> None:
    attempt = attempts("rollout.generate_path=scripted.generate", "rollout.reward.type=null").start()
    assert read_manifest(attempt.batch("rollout", 3)).draws == [0, 1, 2, 3]
    assert read_manifest(attempt.batch("rollout", 4)).draws == [4, 5, 6, 7]
    assert read_manifest(attempt.batch("rollout", 5, next_draw=40)).draws == [40, 41, 42, 43]


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "wrong"}])
def test_every_address_but_health_needs_the_token(attempts, header) -> None:
    attempt = attempts().start("service")
    with httpx.Client(base_url=attempt.url, headers=header, trust_env=False) as http:
        for path in ("/register", "/value", "/work", "/batch", "/announce", "/stop", "/finish", "/heartbeat"):
            assert http.post(path, json={}).status_code == 401
        for path in ("/peers", "/value", "/status"):
            assert http.get(path).status_code == 401
        assert http.get("/health").status_code == 200
    assert attempt.status()["stop"] is False


def test_an_older_epoch_is_fenced_off(attempts) -> None:
    old = attempts()
    new = attempts().start()
    reply = new.http.post("/batch", json={"epoch": old.epoch, "job": {"kind": "sft", "step": 1}})
    assert reply.status_code == 409
    assert reply.json()["error"] == "fenced"
    assert new.batch("sft", 1).exists()  # the service goes on


def test_a_newer_attempt_ends_service_and_worker_with_75(attempts) -> None:
    old = attempts().start()
    old.batch("sft", 1)
    attempts()
    assert old.code("service") == 75
    assert old.code("worker") == 75


def test_a_lost_service_ends_the_worker_with_75(attempts) -> None:
    attempt = attempts().start()
    attempt.batch("sft", 1)
    attempt.kill("service")
    assert attempt.code("worker") == 75


def test_finish_lets_everybody_go_with_0(attempts) -> None:
    attempt = attempts().start()
    attempt.batch("sft", 1)
    assert attempt.post("/finish").status_code == 200
    assert attempt.code("worker") == 0
    assert attempt.code("service") == 0


def test_a_stop_request_is_told_to_the_trainer_only(attempts) -> None:
    attempt = attempts().start()
    attempt.batch("sft", 1)
    attempt.post("/stop")
    assert attempt.post("/announce", phase="train", step=1).json()["stop"] is True
    assert attempt.post("/heartbeat", role="trainer", rank=0).json()["stop"] is True
    time.sleep(1.2)
    assert attempt.alive("worker")


def test_a_silent_role_ends_the_attempt(attempts) -> None:
    attempt = attempts(environment={"MILES_SILENCE_SECONDS": "5"}).start()  # the worker speaks every second or two
    attempt.post("/heartbeat", role="trainer", rank=0)
    assert attempt.code("service") == 75
    assert "trainer 0 was silent" in attempt.log("service").read_text()
    assert attempt.code("worker") == 75


def test_peers_and_values_are_waited_for(attempts) -> None:
    attempt = attempts().start("service")
    assert attempt.http.get("/peers", params={"role": "engine", "count": 2, "wait": 0.1}).status_code == 202
    for rank in (1, 0):
        attempt.post("/register", role="engine", rank=rank, url=f"http://127.0.0.1:{rank}", pid=1, host="here")
    found = attempt.http.get("/peers", params={"role": "engine", "count": 2, "wait": 5}).json()
    assert [peer["rank"] for peer in found] == [0, 1]
    assert attempt.http.get("/value", params={"key": "port", "wait": 0.1}).status_code == 202
    attempt.post("/value", key="port", value=4321)
    assert attempt.http.get("/value", params={"key": "port", "wait": 5}).json() == {"value": 4321}


@pytest.mark.parametrize(
    ("port", "code", "line"),
    [(9, 78, "choose another, or 0 for a free one"), (0, 75, "was taken by another program meanwhile; the next attempt takes another")],
    ids=["chosen", "free"],
)
def test_a_port_in_use_is_one_line(attempts, port: int, code: int, line: str) -> None:
    """A port that somebody chose has to be chosen anew; one that was free a moment ago is just tried again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        attempt = attempts(f"cluster.port={port}")
        attempt.url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        attempt.start("service", wait=False)
        assert attempt.code("service") == code
    assert line in attempt.log("service").read_text()
    assert "Traceback" not in attempt.log("service").read_text()
