"""Rewards: by name against known answers, by import path, over HTTP; whole groups at once."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import reasoning_gym

from miles.config.exits import TryAgain, UserError
from miles.config.schema import Reward, RunConfig
from miles.data.sample import Draw, Sample
from miles.rollout import builtin_rewards, rewards
from miles.rollout.builtin_rewards import boxed
from miles.rollout.rewards import Scorer

sys.path.insert(0, str(Path(__file__).parent))


def group(label: str | None, *responses: str) -> list[Sample]:
    empty = np.zeros(1, np.uint8)
    return [
        Sample(5, index, 0, np.zeros(1, np.int32), 1, np.zeros(1, np.float32), empty, empty, prompt="p", response=text, label=label)
        for index, text in enumerate(responses)
    ]


def score(options: Reward, samples: list[Sample], draw: Draw | None = None, **config: object) -> list[float]:
    async def body() -> None:
        scorer = Scorer(options, RunConfig(**config))
        try:
            await scorer.score(draw or Draw(5, "p"), samples)
        finally:
            await scorer.close()

    asyncio.run(body())
    return [sample.reward for sample in samples]


def test_exact_match() -> None:
    assert score(Reward(type="exact_match"), group("42", " 42\n", "42.", "4 2", "")) == [1.0, 0.0, 0.0, 0.0]


def test_boxed_exact_match() -> None:
    assert score(Reward(type="boxed_exact_match"), group("42", "it is \\boxed{42}", "42", "\\boxed{1} no \\boxed{ 42 }")) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "inside"),
    [("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("\\boxed{1", ""), ("none", ""), ("\\boxed{a} and \\boxed{b{c}d} e}", "b{c}d"), ("\\boxed{}", "")],
)
def test_what_is_in_the_box(text: str, inside: str) -> None:
    assert boxed(text) == inside


def test_math() -> None:
    answers = ("so $\\frac{1}{2}$", "\\boxed{0.5}", "The answer is 1/2.", "\\boxed{\\frac{2}{3}}", "no idea", "")
    samples = group("\\frac{1}{2}", *answers)
    assert score(Reward(type="math"), samples) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert score(Reward(type="boxed_math"), group("12", "12", "\\boxed{12.0}")) == [0.0, 1.0]


def test_reasoning_gym_scores_by_its_own_entry() -> None:
    config = {"seed": 3, "size": 10, "min_terms": 3, "max_terms": 3}
    data = reasoning_gym.create_dataset("chain_sum", **config)
    entry = data[4]
    draw = Draw(5, entry["question"], entry["answer"], {"reasoning_gym_index": 4}, "data")
    section = {"reasoning_gym": "chain_sum", "reasoning_gym_config": config}
    right, wrong = entry["answer"], str(int(entry["answer"]) + 1)
    found = score(Reward(type="reasoning_gym"), group(entry["answer"], f" {right}\n", wrong, f"hm <answer>{right}</answer> so"), draw, data=section)
    assert found[0] == found[2] == 1.0 == data.score_answer(right, entry)
    assert found[1] == data.score_answer(wrong, entry) < 1.0


def test_a_function_by_import_path_gets_the_whole_group() -> None:
    assert score(Reward(path="scripted.reward_sum"), group("x", "a", "b", "c")) == [3.0, 3.1, 3.2]


def test_an_object_and_its_key() -> None:
    samples = group("x", "a", "b")
    assert score(Reward(path="scripted:reward_parts", key="style"), samples) == [0.25, 0.25]
    assert samples[0].reward_parts == {"score": 0.5, "style": 0.25, "draw": 5.0}


def test_no_reward_is_for_generate_functions_that_score() -> None:
    samples = group("x", "a")
    samples[0].reward = 0.5
    assert score(Reward(), samples, rollout={"generate_path": "scripted.generate"}) == [0.5]
    with pytest.raises(UserError, match=r"nothing scores draw 5; set rollout.reward.type"):
        score(Reward(), group("x", "a"), rollout={"generate_path": "scripted.generate"})


def test_a_slow_function_does_not_hold_the_loop() -> None:
    async def body() -> int:
        scorer, turns = Scorer(Reward(path="scripted.reward_slow", timeout=1.5), RunConfig()), 0
        task = asyncio.create_task(scorer.score(Draw(5, "p"), group("x", "a")))
        while not task.done():
            await asyncio.sleep(0.01)
            turns += 1
        with pytest.raises(UserError, match=r"no answer in 1.5 s; raise rollout.reward.timeout"):
            await task
        await scorer.close()
        return turns

    assert asyncio.run(body()) > 10  # in the 2.5 s of the call; a loop that it held would turn once or twice


def test_time_in_the_queue_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six groups of half a second in one process: the last is answered after 3 s, and the start of the process comes on top."""
    monkeypatch.setattr(rewards, "MAX_PROCESSES", 1)
    groups = [group("x", "a") for _ in range(6)]

    async def body() -> float:
        scorer = Scorer(Reward(path="scripted.reward_half_second", timeout=1.5), RunConfig())
        began = time.monotonic()
        await asyncio.gather(*(scorer.score(Draw(number, "p"), samples) for number, samples in enumerate(groups)))
        seconds = time.monotonic() - began
        await scorer.close()
        return seconds

    assert asyncio.run(body()) >= 3.0  # longer than timeout and grace (1 s) together
    assert [samples[0].reward for samples in groups] == [1.0] * 6


@pytest.mark.parametrize(
    ("function", "error", "part"),
    [
        ("reward_killed", TryAgain, r"draw 5: its process was killed by SIGKILL \(out of memory"),
        ("reward_dies", UserError, r"draw 5: its process ended with exit code 3; a reward function must return"),
        ("reward_unpicklable", UserError, r"draw 5: \w+Error: .*pickle"),
        ("reward_times_out_by_itself", UserError, r"draw 5: TimeoutError: the judge's own clock"),
    ],
)
def test_ways_to_fail(function: str, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        score(Reward(path=f"scripted.{function}"), group("x", "a"))


def test_a_module_that_only_the_process_cannot_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fickle.py").write_text("import multiprocessing\nassert multiprocessing.parent_process() is None, 'not here'\ndef reward(s, c): return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="not here"):
        score(Reward(path="fickle.reward"), group("x", "a"))


class Judge(BaseHTTPRequestHandler):
    """A reward server: answers as its list of replies says (status 0: not while the test lasts), and keeps what it was asked."""

    replies: list[tuple[int, str]] = []
    asked: list[dict[str, str]] = []
    pause = 0.0
    over = threading.Event()

    def do_POST(self) -> None:
        Judge.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status, body = Judge.replies.pop(0)
        if status == 0:
            Judge.over.wait()
            return
        time.sleep(Judge.pause)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def judge() -> Iterator[str]:
    Judge.replies, Judge.asked = [], []
    Judge.over.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/score"
    Judge.over.set()
    server.shutdown()
    server.server_close()


def test_remote_rm_posts_prompt_response_label(judge: str) -> None:
    Judge.replies = [(200, "0.75")]
    assert score(Reward(type="remote_rm", url=judge), group("gold", "mine")) == [0.75]
    assert Judge.asked == [{"prompt": "p", "response": "mine", "label": "gold"}]


def test_remote_rm_with_an_object_and_a_hiccup(judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin_rewards, "RM_PAUSE_SECONDS", 0.01)
    Judge.replies = [(503, "busy"), (200, '{"score": 2, "why": "good"}')]
    samples = group("gold", "mine")
    assert score(Reward(type="remote_rm", url=judge, key="score"), samples) == [2.0]
    assert samples[0].reward_parts == {"score": 2.0}


def test_remote_rm_has_the_whole_timeout_for_each_try(judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin_rewards, "RM_PAUSE_SECONDS", 0.01)
    Judge.replies = [(0, ""), (0, ""), (200, "0.5")]
    assert score(Reward(type="remote_rm", url=judge, timeout=2), group("gold", "mine")) == [0.5]


def test_remote_rm_that_never_answers_is_an_outage(judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin_rewards, "RM_PAUSE_SECONDS", 0.01)
    Judge.replies = [(0, "")] * 4
    with pytest.raises(TryAgain, match=r"failed 4 times \(no answer in 0.3 s\)"):
        score(Reward(type="remote_rm", url=judge, timeout=0.3), group("gold", "mine"))
    deadline = time.monotonic() + 60
    while len(Judge.asked) < 4:  # it may read a question after its asker has gone
        assert time.monotonic() < deadline, Judge.asked
        time.sleep(0.01)


def test_remote_rm_waiting_for_a_connection_is_not_late(judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin_rewards, "RM_TRIES", 1)
    monkeypatch.setattr(rewards, "CONNECTIONS", 1)
    monkeypatch.setattr(Judge, "pause", 0.6)
    Judge.replies = [(200, "1")] * 4
    assert score(Reward(type="remote_rm", url=judge, timeout=2), group("gold", "a", "b", "c", "d")) == [1.0] * 4


@pytest.mark.parametrize(
    ("reply", "error", "part"),
    [
        ((404, "no such page"), UserError, "answered 404: no such page"),
        ((200, '"good"'), UserError, "answered 'good'; a number or an object is expected"),
        ((200, '{"score": 1}'), UserError, "set rollout.reward.key"),
        ((200, "NaN"), UserError, "a reward is a finite number"),
        ((500, "oops"), TryAgain, r"failed 4 times \(500: oops\)"),
    ],
)
def test_remote_rm_faults(judge: str, monkeypatch: pytest.MonkeyPatch, reply: tuple[int, str], error: type[Exception], part: str) -> None:
    monkeypatch.setattr(builtin_rewards, "RM_PAUSE_SECONDS", 0.01)
    Judge.replies = [reply] * 4
    with pytest.raises(error, match=part):
        score(Reward(type="remote_rm", url=judge), group("gold", "mine"))


def test_remote_rm_that_nobody_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin_rewards, "RM_PAUSE_SECONDS", 0.01)
    with pytest.raises(TryAgain, match="failed 4 times"):
        score(Reward(type="remote_rm", url="http://127.0.0.1:9/x"), group("gold", "mine"))
    with pytest.raises(UserError, match=r"reward remote_rm, draw 5: rollout.reward.url"):
        score(Reward(type="remote_rm", url="nonsense"), group("gold", "mine"))
