"""One rank and two give the same training; interrupted and resumed training has the bits of an undisturbed one.

Real processes: for 1 and for 2 ranks, one start trains (undisturbed, and up to a checkpoint), another resumes.
"""

import math

import numpy as np
import pytest
import tiny
from programs import by_sequence
from run_ranks import run

from miles.data.store.train_record import open_train_record

GLOBAL = ("train/loss", "train/grad_norm", "train/entropy_loss", "train/train_rollout_kl", "train/train_rollout_logprob_abs_diff", "train/mismatch_tokens")
PLAIN = {"algorithm": {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3"}}
RESUMED = {
    "algorithm": {"use_kl_loss": True, "kl_loss_type": "low_var_kl", "kl_loss_coef": 0.05},
    "train": {"optimizer": {"lr": 1e-2, "lr_schedule": "linear", "lr_warmup_steps": 2}, "num_steps_per_rollout": 2},
}


def number(text):
    return float.fromhex(text)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{world: {name: [result of each rank]}} and the folder of everything."""
    folder = tmp_path_factory.mktemp("ranks")
    model = str(tiny.make_model(folder / "hf"))
    series = {"model": model, "optimizer_steps": 2, "sft_until": 2, "reference": model, "sections": RESUMED}
    found = {1: {}, 2: {}}
    for world in (1, 2):
        first = {
            "plain": {"model": model, "work": f"{folder}/plain.{world}", "steps": 2, "sections": PLAIN, "reference": model, "routes": True},
            "straight": {**series, "work": f"{folder}/straight.{world}", "steps": 6},
            "before": {**series, "work": f"{folder}/parts.{world}", "steps": 3, "save_at": 3},
        }
        answers = run(world, "programs.several", folder / f"first.{world}", jobs=list(first.values()))
        found[world] |= {name: [rank[index] for rank in answers] for index, name in enumerate(first)}
    for world in (1, 2):
        rest = {**series, "first": 4, "resume": True}
        second = {
            "after": {**rest, "work": f"{folder}/parts.{world}", "steps": 3},
            "loaded": {**rest, "work": f"{folder}/other.{world}", "load_from": f"{folder}/parts.{3 - world}", "steps": 0},
            "gone_on": {**rest, "work": f"{folder}/other.{world}", "load_from": f"{folder}/parts.{3 - world}", "steps": 1},
        }
        answers = run(world, "programs.several", folder / f"second.{world}", jobs=list(second.values()))
        found[world] |= {name: [rank[index] for rank in answers] for index, name in enumerate(second)}
    return found, folder


def test_two_ranks_train_as_one(results):
    found, folder = results
    one, two = found[1]["plain"], found[2]["plain"]
    assert two[0]["checksum"] == two[1]["checksum"]
    same = {name for name in two[0]["metrics"][0] if name != "draw"}
    for mine, yours in zip(two[0]["metrics"], two[1]["metrics"], strict=True):
        assert {name: mine[name] for name in same} == {name: yours[name] for name in same}, "metrics are global"
    for name in GLOBAL:
        assert number(two[0]["metrics"][0][name]) == pytest.approx(number(one[0]["metrics"][0][name]), rel=1e-5, abs=1e-7), name
    records = [folder / f"plain.{world}" / f"train.{world}" / "1" for world in (1, 2)]
    first, other = (by_sequence(record, "train_logprob") for record in records)
    assert first == other, "batch-invariant log-probs have the same bits in any layout"
    first_misses, other_misses = (by_sequence(record, "route_miss") for record in records)
    assert first_misses == other_misses
    layers = []
    for record in records:
        with open_train_record(record / "node_0000.h5") as opened:
            layers.append({name: counts.tolist() for name, counts in opened.layers().items()})
    assert layers[0] == layers[1], "ranks are added up"
    assert sum(layers[0]["route_miss"]) > 0
    assert len(first) == 24
    assert number(one[0]["metrics"][0]["train/kl_loss"]) == 0
    assert number(one[0]["metrics"][1]["train/kl_loss"]) > 0


@pytest.mark.parametrize("world", [1, 2])
def test_resume_has_the_bits_of_an_undisturbed_run(results, world):
    straight, before, after = (results[0][world][name] for name in ("straight", "before", "after"))
    for rank in range(world):
        assert before[rank]["metrics"] + after[rank]["metrics"] == straight[rank]["metrics"]
        assert after[rank]["checksum"] == straight[rank]["checksum"]
        assert after[rank]["optimizer"] == straight[rank]["optimizer"]
        assert after[rank]["progress"] == {"next_draw": 30}
        assert after[rank]["said"] == []
        assert len({line["draw"] for line in straight[rank]["metrics"]}) == 12, "the generator moved on"
    assert straight[0]["checksum"] != before[0]["checksum"]


@pytest.mark.parametrize("world", [1, 2])
def test_checkpoint_serves_another_number_of_ranks(results, world):
    saved, loaded, gone_on = results[0][3 - world]["before"], results[0][world]["loaded"], results[0][world]["gone_on"]
    assert loaded[0]["checksum"] == saved[0]["checksum"]
    totals = [sum(number(result["optimizer"]) for result in ranks) for ranks in (saved, loaded)]
    assert math.isclose(*totals, rel_tol=1e-12)
    assert np.isfinite(number(gone_on[0]["metrics"][0]["train/loss"]))
    assert gone_on[0]["checksum"] != saved[0]["checksum"]
