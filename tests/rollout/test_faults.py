"""Users' mistakes: one line that names fault and mend, exit 78, no traceback, batches kept; the trainer hears the same line."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPTED = ("rollout.generate_path=scripted.generate",)


def run_into_fault(attempts, kind: str, *overrides: str) -> tuple[str, str]:
    """(what the trainer is told, what the worker's log says)"""
    attempt = attempts(*overrides).start()
    told = ""
    for _ in range(20):
        reply = attempt.post("/batch", job={"kind": kind, "step": 3 if kind != "sft" else 1, "weight_version": 2, "weight_checksum": "aa", "next_draw": 0})
        if reply.status_code == 422:
            told = reply.json()["error"]
            break
        assert reply.status_code == 202, reply.text
    assert attempt.code("worker") == 78
    assert attempt.code("service") == 78
    log = attempt.log("worker").read_text()
    assert "Traceback" not in log
    assert "Traceback" not in attempt.log("service").read_text()
    assert told in log
    return told, log


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("rollout.reward.path=scripted.reward_raises",), ("reward scripted.reward_raises, draw ", "ValueError: gold answer")),
        (("rollout.reward.path=scripted.reward_short",), ("returned 1 entries for a group of 4 samples", "one reward a sample")),
        (("rollout.reward.path=scripted.reward_nan",), ("reward scripted.reward_nan, draw ", "returned nan for sample 0; a reward is a finite number")),
        (("rollout.reward.path=scripted.reward_parts",), ("returned an object with 'score', 'style', 'draw'", "rollout.reward.key")),
        (("rollout.reward.path=scripted.reward_parts", "rollout.reward.key=taste"), ("without 'taste'",)),
        (("rollout.reward.path=scripted.reward_slow", "rollout.reward.timeout=0.5"), ("no answer in 0.5 s", "rollout.reward.timeout")),
        (("rollout.reward.path=scripted.reward_dies",), ("its process ended with exit code 3",)),
        (("rollout.reward.type=exact_match", "rollout.filter_path=scripted.keep_wrongly"), ("scripted.keep_wrongly, draw ", "LookupError: filter broke")),
        (("rollout.reward.type=exact_match", "rollout.filter_path=scripted.keep_by_number"), ("rollout.filter_path scripted.keep_by_number, draw ", "TypeError: a filter answers True, False or a reason, not int")),
        (("rollout.reward.type=exact_match", "rollout.filter_path=scripted.keep_none"), ("the filter dropped all of", "filtered")),
        (("rollout.reward.type=exact_match", "rollout.sampling.max_prompt_len=2"), ("the prompt has ", "more than rollout.sampling.max_prompt_len 2; raise it, or remove the row (")),
        (("rollout.reward.type=exact_match", "rollout.generate_path=scripted.generate_badly"), ("generate scripted.generate_badly, draw ", "ZeroDivisionError: no tokens at all")),
        (("rollout.reward.type=reasoning_gym",), ("scores prompts of reasoning-gym only",)),
    ],
    ids=lambda value: None if value and value[0].startswith("r") is False else "+".join(part.split(".")[-1] for part in value),
)
def test_a_fault_while_working(attempts, overrides: tuple[str, ...], parts: tuple[str, ...]) -> None:
    base = ("rollout.reward.type=null",) if any("reward.path" in each for each in overrides) else ()
    told, _ = run_into_fault(attempts, "rollout", *SCRIPTED, *base, *overrides)
    assert "\n" not in told
    for part in parts:
        assert part in told


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("rollout.reward.type=exactmatch",), "no reward 'exactmatch'; known are exact_match, math"),
        (("rollout.reward.type=null", "rollout.reward.path=scripted.missing"), "has no function 'missing'"),
        (("rollout.reward.type=null", "rollout.reward.path=nowhere.at_all"), "can't import nowhere"),
        (("rollout.filter_path=scripted.no_filter",), "rollout.filter_path: scripted has no function 'no_filter'"),
        (("rollout.generate_path=noname",), "is no import path"),
    ],
)
def test_a_wrong_name_ends_the_worker_at_its_start(attempts, overrides: tuple[str, ...], part: str) -> None:
    attempt = attempts(*overrides).start()
    assert attempt.code("worker") == 78
    log = attempt.log("worker").read_text()
    assert part in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"question": "a", "answer": "1"}\n{"question": "b", \n', "data.jsonl:2: not a JSON object"),
        ('{"question": "a", "answer": "1"}\n\n["b"]\n', "data.jsonl:3: expected a JSON object"),
        ('{"questoin": "a", "answer": "1"}\n', "data.jsonl:1: no key 'question'; did you mean 'questoin'? set data.input_key"),
        ('{"question": "a", "answers": "1"}\n', "data.jsonl:1: no key 'answer'; did you mean 'answers'? set data.label_key"),
        ('{"question": 7, "answer": "1"}\n', "data.jsonl:1: 'question' must be text, or a list of chat messages"),
        ('{"question": "a", "answer": "1", "metadata": 3}\n', "'metadata' must be an object"),
        ("\n", "no rows"),
        ('{"question": "2  +\\t3 =", "answer": "5"}\n', "data.jsonl:1: this prompt occurs in"),
    ],
)
def test_a_fault_in_the_data_ends_the_service_at_its_start(attempts, tmp_path: Path, content: str, part: str) -> None:
    attempt = attempts("data.exclude=[eval]")
    (tmp_path / "data.jsonl").write_text(content)
    attempt.start("service", wait=False)
    assert attempt.code("service") == 78
    log = attempt.log("service").read_text()
    assert part in log
    assert "Traceback" not in log


def test_a_missing_file(attempts, tmp_path: Path) -> None:
    attempt = attempts(f"data.prompt_data={tmp_path}/dat.jsonl")
    attempt.start("service", wait=False)
    assert attempt.code("service") == 78
    assert f"{tmp_path}/dat.jsonl: no such file; did you mean {tmp_path}/data.jsonl?" in attempt.log("service").read_text()


def test_a_warm_start_without_labels(attempts) -> None:
    told, _ = run_into_fault(attempts, "sft", "warm_start.label_key=null")
    assert "no response to learn; set warm_start.label_key" in told
