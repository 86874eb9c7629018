"""What corrections would have done, against plain float64 numpy that applies each token by token, and against training's own weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import plain
import pytest
import torch
from made_runs import Made, make_sample, make_train, random_run, write_run

from miles.algorithms.corrections import truncated_importance
from miles.analysis import measure, simulate, simulation_pass
from miles.analysis.analyze import analyze
from miles.analysis.corrections import FIXED, HIGHS, LOWS, SAMPLED, VETOES, WIDTHS, Setting
from miles.analysis.ranks import Alone
from miles.analysis.state import State


@pytest.fixture(scope="module", params=[0.05, 0.7], ids=["noise 0.05", "noise 0.7"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Made], State]:
    folder = tmp_path_factory.mktemp("run")
    made = random_run(folder, seed=7, noise=request.param)
    return folder, made, analyze(folder, Alone(), chunk=4000)


def vetoed(made: Made) -> bool:
    """A token that the rollout sampled and the trainer holds impossible."""
    mu, o = made.sample.rollout_logprob, made.train["train_logprob"]
    return bool(((made.sample.loss_mask != 0) & np.isfinite(mu) & (mu > -1e30) & (o < -1e30)).any())


def expected(made: list[Made], setting: Setting) -> dict[str, float]:
    """One setting, a token at a time."""
    weight, ratio, clipped, masked, dropped, gone = [], [], [], [], [], []
    for each in made:
        d = plain.tokens_of(each)["d"]
        if not len(d):
            continue
        rho = np.exp(np.clip(d, -20, 20))
        whole = np.exp(np.clip(d.sum(), -20, 20))
        out = vetoed(each) or (rho < setting.veto).any() if setting.veto is not None else False
        if setting.geometric is not None:
            out = out or not setting.geometric[0] <= np.exp(d.mean()) <= setting.geometric[1]
        value = rho if setting.level == "token" else np.array([whole])
        beyond = (value < setting.low) | (value > setting.high) if setting.mode != "off" else np.zeros(len(value), bool)
        w = {"off": np.ones(len(value)), "truncate": np.clip(value, setting.low, setting.high), "mask": np.where(beyond, 0.0, value)}[setting.mode]
        if setting.level == "sequence" and setting.mode == "mask":
            out = bool(beyond[0])
        gone.append(out)
        dropped.append(np.full(len(d), out))
        weight.append(w * (not out))
        ratio.append(value)
        clipped.append(beyond & (not out) & (setting.mode == "truncate"))
        masked.append(beyond & (not out) & (setting.mode == "mask"))
    w, rho = np.concatenate(weight), np.concatenate(ratio)
    return {
        "clipped": np.concatenate(clipped).mean(), "masked_tokens": np.concatenate(masked).mean(), "dropped_tokens": np.concatenate(dropped).mean(),
        "dropped_sequences": np.mean(gone), "ess": w.sum() ** 2 / (len(w) * (w**2).sum()), "bias": np.abs(w - rho).sum() / rho.sum(), "mean_weight": w.mean(),
    }  # fmt: skip


SHARES = ("clipped", "masked_tokens", "dropped_tokens", "dropped_sequences")


@pytest.mark.parametrize("setting", FIXED, ids=lambda setting: setting.name)
def test_fixed_settings(run, setting):
    _, made, state = run
    rows = {row["name"]: row for row in simulate.simulated(state, measure.token_metrics(state))}
    for name, value in expected(made, setting).items():
        found = rows[setting.name][name]
        close = 1e-12 if name in SHARES else 1e-4 if setting.level == "sequence" else 3e-6  # of a sequence the sum of d, in fp32, is exponentiated
        assert found == pytest.approx(value, rel=close, abs=close / 10), name


def test_every_bound_that_is_counted_by_can_be_asked_for(run):
    _, made, state = run
    settings = [Setting("x", mode=mode, low=low, high=high) for low, high in zip(LOWS, HIGHS, strict=False) for mode in ("truncate", "mask")]
    settings += [Setting("x", "sequence", "truncate", low, high) for low, high in zip(LOWS, HIGHS, strict=False)]
    settings += [Setting("x", mode="truncate", high=3.0, geometric=(1 - low, 1 + high), veto=VETOES[i % 3]) for i, (low, high) in enumerate(zip(WIDTHS, WIDTHS[::-1], strict=True))]
    moved = set()
    for setting, found in zip(settings, simulate.judged(state, *settings), strict=True):
        wanted = expected(made, setting)
        for name in SHARES:
            assert found[name] == pytest.approx(wanted[name], abs=1e-12), (setting, name)
            moved.add((name, found[name]))
        assert found["bias"] == pytest.approx(wanted["bias"], rel=1e-4, abs=1e-7), setting
    assert len(moved) > 30, "bounds that matter in these data"


def test_bounds_from_the_data_hold_the_share_they_promise(run):
    _, made, state = run
    parts = [part for part in (plain.tokens_of(each)["d"] for each in made) if len(part)]
    d = np.concatenate(parts)
    low, high = simulate.token_bounds(state)
    tighter_high, tighter_low = HIGHS[max(HIGHS.index(high) - 1, 0)], LOWS[max(LOWS.index(low) - 1, 0)]
    assert (d > np.log(high)).mean() < 1.2e-3 or high == HIGHS[-1]
    assert (d < np.log(low)).mean() < 1.2e-3 or low == LOWS[-1]
    assert high == HIGHS[0] or (d > 0.96 * np.log(tighter_high)).mean() >= 1e-3
    assert low == LOWS[0] or (d < 0.96 * np.log(tighter_low)).mean() >= 1e-3
    tokens = measure.token_metrics(state)
    width = simulate.mean_width(state, tokens)
    assert width == min(x for x in WIDTHS if x >= 3 * d.std() / np.sqrt(len(d) / len(parts)))
    names = [row["name"] for row in simulate.simulated(state, tokens)]
    assert f"data: TIS up to {high:g}" in names
    assert f"data: geometric {1 - width:g} to {1 + width:g}" in names


@pytest.mark.parametrize(("low", "high"), [(0.0, 2.0), (0.5, 1.5), (0.5, 2.0), (0.1, 5.0), (0.0, 1.1)])
def test_truncation_is_that_of_training(run, low, high):
    _, made, state = run
    train, rollout, mask = (
        torch.from_numpy(np.concatenate(parts)) for parts in zip(*((each.train["train_logprob"], each.sample.rollout_logprob, each.sample.loss_mask != 0) for each in made), strict=True)
    )
    known = mask & torch.isfinite(train) & torch.isfinite(rollout) & (rollout.abs() <= 1e30)  # others are counted apart by the analysis
    there = truncated_importance(train, rollout, known, low=low, high=high)
    [found] = simulate.judged(state, Setting("x", mode="truncate", low=low, high=high))
    count = int(known.sum())
    assert found["clipped"] * count == pytest.approx(int(there.clipped.sum()), abs=1e-6)
    weight, raw = there.weight[known].double(), there.raw[known].double()
    assert found["mean_weight"] == pytest.approx(float(weight.mean()), rel=1e-6)
    assert found["bias"] == pytest.approx(float((weight - raw).abs().sum() / raw.sum()), rel=1e-5, abs=1e-9)


def test_places_and_density(run):
    _, made, state = run
    found = simulate.places(state)
    for kind, value in (("train_rank", lambda each: each.rank), ("engine", lambda each: each.sample.engine)):
        wanted: dict = {}
        for each in made:
            wanted.setdefault((value(each), each.step), []).append(plain.tokens_of(each)["d"])
        wanted = {key: np.concatenate(parts) for key, parts in wanted.items() if sum(map(len, parts))}
        rows = {(row[kind], row["step"]): row for row in found[kind]}
        assert {key: row["tokens"] for key, row in rows.items()} == {key: len(d) for key, d in wanted.items()}
        for key, d in wanted.items():
            assert rows[key]["abs_diff"] == pytest.approx(np.abs(d).mean(), rel=1e-5)
            assert rows[key]["mean_diff"] == pytest.approx(d.mean(), rel=1e-5, abs=1e-7)
        assert all(row["last_step"] == row["step"] for row in rows.values())
    table = np.zeros((64, 64), int)
    for each in made:
        part = plain.tokens_of(each)
        some = part["at"] % SAMPLED == 0
        cells = [np.clip(-4 * part[name][some], 0, 63).astype(int) for name in ("mu", "o")]
        np.add.at(table, tuple(cells), 1)
    assert (simulate.density(state) == table).all()
    assert table.sum() > 1000


def test_many_steps_are_looked_at_in_stretches(tmp_path, monkeypatch):
    monkeypatch.setattr(simulation_pass, "STRETCHES", 4)
    random = np.random.default_rng(3)
    made = []
    for step in range(10, 30, 2):
        sample = make_sample(random, step, 0, 2, 12, step)
        made.append(Made(step, sample, make_train(random, sample, 0.1), 0, -1, 0, 0, step))
    write_run(tmp_path, made)
    rows = simulate.places(analyze(tmp_path, Alone()))["train_rank"]
    assert [(row["step"], row["last_step"]) for row in rows] == [(step, min(step + 4, 28)) for step in range(10, 30, 6)]
    for row in rows:
        d = np.concatenate([plain.tokens_of(each)["d"] for each in made if row["step"] <= each.step <= row["last_step"]])
        assert row["tokens"] == len(d)
        assert row["abs_diff"] == pytest.approx(np.abs(d).mean(), rel=1e-5)


def test_bitwise_equal_run_needs_no_correction(tmp_path):
    random = np.random.default_rng(3)
    made = []
    for draw in range(4):
        sample = make_sample(random, draw, 0, 5, 700, 1)
        made.append(Made(1, sample, {**make_train(random, sample, 0.0), "train_logprob": sample.rollout_logprob.copy()}, 0, -1, 0, 0, 1))
    write_run(tmp_path, made)
    state = analyze(tmp_path, Alone())
    for row in simulate.simulated(state, measure.token_metrics(state)):
        assert [row[name] for name in (*SHARES, "ess", "bias", "mean_weight")] == [0, 0, 0, 0, 1, 0, 1], row["name"]
