import json
import math

import numpy as np
import pytest

from miles.data.store.epoch import Fence, Fenced, new_epoch
from miles.data.store.events import Events, read_events
from miles.data.store.metrics import Metrics, as_float, read_metrics


def line(step, kind="rollout", **more):
    return {"step": step, "kind": kind, **more}


def test_lines_come_back_with_the_same_bits(run_dir):
    values = {"train/loss": 0.1 + 0.2, "train/grad_norm": np.float32(1 / 3), "n": np.int64(2), "bad": float("nan"), "worse": float("-inf")}
    Metrics(run_dir.metrics).append(line(0, **values))
    (found,) = read_metrics(run_dir.metrics)
    assert found["train/loss"] == 0.1 + 0.2
    assert np.float32(found["train/grad_norm"]) == np.float32(1 / 3)
    assert found["n"] == 2
    assert math.isnan(found["bad"])
    assert json.loads(run_dir.metrics.read_text(), parse_constant=pytest.fail)["worse"] is None  # strict JSON


def test_torn_last_line_is_passed_over_and_written_past(run_dir):
    Metrics(run_dir.metrics).append(line(0))
    Metrics(run_dir.metrics).append(line(1, value=123456))
    whole = run_dir.metrics.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) - 1):
        run_dir.metrics.write_bytes(whole[:cut])
        assert [each["step"] for each in read_metrics(run_dir.metrics)] == [0]
        Metrics(run_dir.metrics).append(line(2))
        assert [each["step"] for each in read_metrics(run_dir.metrics)] == [0, 2]


def test_integers_that_no_float_holds_are_infinite():
    assert [as_float(value) for value in (10**400, -(10**400), 10**300, 2, 0.5)] == [math.inf, -math.inf, 1e300, 2.0, 0.5]


def test_cut_back_keeps_steps_up_to_the_checkpoint(run_dir):
    assert Metrics(run_dir.metrics).cut_back(3) == 0
    for step, kind in ((0, "sft"), (1, "sft"), (1, "eval"), (2, "rollout"), (3, "rollout"), (3, "eval")):
        Metrics(run_dir.metrics).append(line(step, kind))
    with open(run_dir.metrics, "ab") as file:
        file.write(b'{"step": 4, "ki')
    kept = run_dir.metrics.read_bytes().split(b"\n")[:4]
    assert Metrics(run_dir.metrics).cut_back(2) == 3
    assert run_dir.metrics.read_bytes() == b"\n".join(kept) + b"\n"
    assert Metrics(run_dir.metrics).cut_back(2) == 0
    assert Metrics(run_dir.metrics).cut_back(-1) == 4
    assert read_metrics(run_dir.metrics) == []


@pytest.mark.parametrize("without", ['{"kind": "rollout"}', '{"step": null}', '{"step": "three"}', "[]"])
def test_a_line_without_a_step_counts_as_a_torn_one(run_dir, without):
    run_dir.metrics.parent.mkdir(parents=True, exist_ok=True)
    run_dir.metrics.write_text(f'{{"step": 1}}\n{without}\n{{"step": 2}}\n')
    assert read_metrics(run_dir.metrics) == [{"step": 1}, {"step": 2}]
    assert Metrics(run_dir.metrics).cut_back(2) == 1
    assert run_dir.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_old_attempt_writes_no_metrics(run_dir):
    old = Fence(run_dir, new_epoch(run_dir))
    Metrics(run_dir.metrics, old).append(line(0))
    new_epoch(run_dir)
    with pytest.raises(Fenced):
        Metrics(run_dir.metrics, old).append(line(1))
    with pytest.raises(Fenced):
        Metrics(run_dir.metrics, old).cut_back(-1)
    assert [each["step"] for each in read_metrics(run_dir.metrics)] == [0]


def test_phases_are_written_when_they_end(run_dir):
    events = Events(run_dir, "trainer", 1, 3)
    with events.phase("train", 5, tokens=7) as facts:
        assert read_events(run_dir) == []
        facts["bytes"] = 9
    with pytest.raises(KeyError), Events(run_dir, "engine.0", 0, 3).phase("save", 6):
        raise KeyError("x")
    train, save = read_events(run_dir)
    assert {key: train[key] for key in ("component", "rank", "epoch", "phase", "step", "tokens", "bytes")} == {
        "component": "trainer", "rank": 1, "epoch": 3, "phase": "train", "step": 5, "tokens": 7, "bytes": 9
    }  # fmt: skip
    assert train["start"] <= train["end"] <= save["start"] <= save["end"]
    assert (save["component"], save["error"]) == ("engine.0", "KeyError")
    assert (run_dir.events / "trainer.1.3.jsonl").is_file()


def test_events_of_a_killed_writer_and_of_others_are_passed_over(run_dir):
    events = Events(run_dir, "trainer", 0, 1)
    events.append("train", 1, 10.0, 11.0)
    events.append("train", 2, 11.0, 12.0)
    whole = events.path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) - 1):
        events.path.write_bytes(whole[:cut])
        assert [event["step"] for event in read_events(run_dir)] == [1]
    events.append("sync", 2, 12.0, 13.0)  # begins a line of its own
    (run_dir.events / "notes.jsonl").write_text('{"start": 1}\n')
    (run_dir.events / "a.b.c.jsonl").write_text('{"start": 1}\n')
    (run_dir.events / "worker.0.1.jsonl").write_text('{"phase": "generate"}\n[1]\n')
    assert [event["phase"] for event in read_events(run_dir)] == ["train", "sync"]
