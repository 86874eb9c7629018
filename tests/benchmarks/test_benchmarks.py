"""The benchmarks run, on tiny models: every side generates what was asked for, and rows judge as they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.generation import Case, measure  # noqa: E402
from benchmarks.rehearse_case import PROMPT, Found  # noqa: E402
from benchmarks.rehearse_case import Case as Rehearsal  # noqa: E402
from benchmarks.rehearse_engine import SHARES  # noqa: E402
from benchmarks.rehearse_memory import judge_memory  # noqa: E402
from benchmarks.table import Row  # noqa: E402
from benchmarks.workload import LONGEST, REQUESTS, SHORTEST, make_workload  # noqa: E402
from miles.rollout.draws import sampling_seed  # noqa: E402


def build_tiny(folder: Path) -> Path:
    from miles.recipes.quickstart import build_tiny

    build_tiny(folder, 0)
    return folder


def test_lengths_are_spread_from_8_to_256():
    work = make_workload(300, 10)
    assert len(work.prompts) == len(work.lengths) == REQUESTS == 64
    assert (min(work.lengths), max(work.lengths)) == (SHORTEST, LONGEST) == (8, 256)
    gaps = [b - a for a, b in zip(sorted(work.lengths), sorted(work.lengths)[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1
    assert work.lengths != sorted(work.lengths)
    assert work.tokens == 64 * 132
    assert {len(prompt) for prompt in work.prompts} == {10}
    assert len({tuple(prompt) for prompt in work.prompts}) == 64


@pytest.mark.parametrize(
    ("ratio", "at_least", "passed"), [(3.0, True, True), (2.99, True, False), (1.1, False, True), (1.11, False, False)]
)
def test_a_row_is_judged_by_its_goal(ratio, at_least, passed):
    row = Row("name", ratio, 3.0 if at_least else 1.1, at_least)
    assert row.passed is passed
    assert row.as_json()["passed"] is passed


def test_a_row_without_goal_is_not_judged():
    assert Row("name", 0.1).passed is None


def test_generation_is_measured_on_every_side():
    said: list[str] = []
    case = Case("tiny", build_tiny, 3.0, prompt=4, orders=(True, False), rounds=2, shorter=1, turns=1)
    rows = measure(case, said.append, quick=True)
    assert [row.goal for row in rows] == [3.0, None, None]
    assert all(row.ratio > 0 for row in rows)
    seconds = rows[0].found["seconds"]
    assert set(rows[0].found["generate_trials"]) == {"batches of 8 by length", "batches of 8 as they come"}
    assert {"engine", "plain", "bare"} < set(seconds)
    [setting] = [name for name in seconds if rows[0].found["generate_setting"] in name]
    assert rows[0].ratio == pytest.approx(seconds[setting][0] / seconds["engine"][0])
    assert any("turn 1 of 1" in line for line in said)


TRAIN = """
import json, sys
from pathlib import Path
from benchmarks.train_step import measure
def build(folder):
    from transformers import LlamaConfig, LlamaForCausalLM
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                                 intermediate_size=16, dtype="float32")).save_pretrained(folder)
    return folder
rows = measure(lambda line: None, repeats=1, build=build)
print(json.dumps([row.as_json() for row in rows]))
"""


def test_train_step_is_measured(tmp_path):
    done = subprocess.run([sys.executable, "-c", TRAIN], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    step, cost = json.loads(done.stdout.splitlines()[-1])
    assert step["goal"] == "at most 1.10x"
    assert cost["goal"] is None
    assert {label: len(values) for label, values in step["seconds"].items()} == {"train step": 1, "bare": 1, "plain": 1}
    assert step["ratio"] == pytest.approx(step["seconds"]["train step"][0] / step["seconds"]["bare"][0])


def test_a_rehearsal_brings_every_token_and_few_files():
    done = subprocess.run([sys.executable, "-m", "benchmarks.rehearse", "--quick", "--json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    [case] = told["cases"]
    for number, line in enumerate(case["steps"], 1):
        seeds = [sampling_seed(1234, draw, sample, 0) for draw in range(3 * number - 3, 3 * number) for sample in range(4)]
        assert line["tokens"] == sum(int(256 * SHARES[seed % len(SHARES)]) for seed in seeds)
        assert line["all_tokens"] == line["tokens"] + 12 * PROMPT
        assert line["asked"] < line["last_token"] < line["sealed"] < line["first"] < line["recorded"]
    assert case["files"] == [4, 4]  # manifest, shard, routes, record
    assert all(goal["passed"] for goal in told["goals"])
    roles = ("service", "engine", "worker", "trainer", "reward")
    memory = {goal for role in roles for goal in (f"peak memory of {role}", f"rise of {role} over idle")}
    assert {goal["what"].split(": ")[1].split(" [")[0] for goal in told["goals"]} >= memory | {"new files a step (one node)"}
    assert all(0 <= case["rise"][role] <= case["memory"][role] - case["idle"][role] for role in roles)
    assert any(line["what"] == "tokens of a step" and line["value"] == "134 M" for line in told["scale"])


MEGABYTE = 10**6


@pytest.mark.parametrize(
    ("million_tokens", "rise", "missed"),
    [
        (5.5, {}, []),
        (5.5, {"worker": 5_500 * 490_000}, ["peak memory of worker", "rise of worker over idle"]),  # the whole batch
        (5.5, {"worker": 450 * MEGABYTE}, ["rise of worker over idle"]),  # far less than the wide bound
        (5.5, {"trainer": 5_500 * (10_000 + 13_000)}, ["rise of trainer over idle"]),  # batch and record
        (5.5, {"service": 5_500 * 10_000}, ["rise of service over idle"]),
        (5.5, {"reward 1": 5_500 * 10_000}, ["rise of reward 1 over idle"]),
        (3.0, {}, ["a batch, 4 × the worker's rise or more"]),  # too small to show anything
    ],
)
def test_a_rehearsal_sees_who_holds_a_whole_batch(million_tokens: float, rise: dict[str, int], missed: list[str]) -> None:
    line = {"all_tokens": int(million_tokens * 1e6), "largest_group": 190_000, "largest_micro_batch": 33_024}
    usual = {"service": 5 * MEGABYTE, "worker": 400 * MEGABYTE, "trainer": 80 * MEGABYTE, "reward": 2 * MEGABYTE, "reward 1": 2 * MEGABYTE} | rise
    idle = dict.fromkeys(usual, 120 * MEGABYTE)
    case = Rehearsal("routes", steps=1, groups=64, samples=8, longest=32768, routes=True, large=True)
    found = Found(case, [line], idle=idle, rise=usual, memory={role: idle[role] + size for role, size in usual.items()})
    goals = judge_memory(found)
    assert [goal["what"].split(": ")[1].split(" [")[0] for goal in goals if not goal["passed"]] == missed
    bounds = {goal["what"].split(": ")[1].split(" [")[0]: goal["goal"] for goal in goals}
    assert bounds["peak memory of worker"] == 1_000_000_000 + 2 * 190_000 * 490
    assert bounds["rise of worker over idle"] == (128 + 64 + 48) * 1_048_576 + 2 * 190_000 * 490
    assert bounds["rise of trainer over idle"] == 48 * 1_048_576 + int(million_tokens * 1e6) * 13 + 2 * 33_024 * 10
    assert bounds["rise of service over idle"] == 48 * 1_048_576
