"""Every metric against plain float64 numpy, on ragged data with every edge there is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import plain
import pytest
from made_runs import Made, make_sample, make_train, random_run, write_run
from script import script

from miles.analysis import measure
from miles.analysis.analyze import analyze
from miles.analysis.ranks import Alone
from miles.analysis.slices import SLICES
from miles.analysis.state import VOCABULARY, State
from miles.analysis.verdict import judge
from miles.data.sample import Flag

CLOSE = 3e-6  # differences and exponentials are fp32: each term within some 1e-7 of itself


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Made], State]:
    folder = tmp_path_factory.mktemp("run")
    made = random_run(folder)
    return folder, made, analyze(folder, Alone(), chunk=4000)


def agree(found: dict, expected: dict, size: float) -> None:
    """size: what a sum with cancelling terms is measured by."""
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=CLOSE, abs=CLOSE * size), name


def test_token_metrics(run):
    _, made, state = run
    expected, found = plain.token_metrics(made), measure.token_metrics(state)
    assert expected["tokens"] > 5000
    for name in ("masked", "tokens", "equal_bits", "not_comparable"):
        assert found[name] == expected.pop(name)
    agree(found, expected, expected["abs_diff"] / 100)


def test_log_probs_that_cannot_be_compared_are_counted_by_kind(run):
    _, made, state = run
    counts = measure.counts_of(state)
    mask = [each.sample.loss_mask != 0 for each in made]
    mu = np.concatenate([each.sample.rollout_logprob[on] for each, on in zip(made, mask, strict=True)])
    o = np.concatenate([each.train["train_logprob"][on] for each, on in zip(made, mask, strict=True)])
    expected = [np.isnan(mu).sum(), (mu <= -1e30).sum(), np.isnan(o).sum(), (o <= -1e30).sum()]
    assert min(expected[1:]) > 0
    assert [counts[name] for name in ("rollout_nan", "rollout_infinite", "train_nan", "train_infinite")] == expected
    assert (counts["rollout_absurd"], counts["train_absurd"]) == (0, 0)


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize(("value", "side"), [(-3e19, "train"), (-1e29, "train"), (1e29, "train"), (-1001.0, "train"), (-2e19, "rollout"), (9e5, "rollout")])
def test_absurd_log_probs_are_counted_break_the_verdict_and_enter_no_average(tmp_path, value, side, core):
    made = random_run(tmp_path / "sane", seed=6, noise=0.01, longest=300)
    before = measure.token_metrics(analyze(tmp_path / "sane", Alone()))
    for each in made:
        each.sample.engine = "http://engine0"
    at = next((each, place) for each in made for place in plain.tokens_of(each)["at"])
    at[0].sample.rollout_logprob[at[1]], at[0].train["train_logprob"][at[1]] = (value, -1.0) if side == "rollout" else (-1.0, value)
    write_run(tmp_path / "run", made)
    state = analyze(tmp_path / "run", Alone(), core=core)
    found = measure.token_metrics(state, core)
    assert (found["absurd"], found["tokens"], measure.counts_of(state)[f"{side}_absurd"]) == (1, before["tokens"] - 1, 1)
    assert found["max_abs_diff"] <= before["max_abs_diff"]
    verdict = judge(found, {} if core else measure.standard_errors(state))
    assert verdict.word == "broken"
    assert any("1 log-prob is finite and beyond" in why for why in verdict.why)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_greatest_log_probs_that_count_are_judged_and_shown(tmp_path, capsys, sign):
    made = random_run(tmp_path / "sane", seed=6, longest=300)
    for each in made:
        each.sample.rollout_logprob[:], each.train["train_logprob"][:] = 1000.0 * sign, -1000.0 * sign
    write_run(tmp_path / "run", made)
    capsys.readouterr()
    assert script("logprob_mismatch", tmp_path / "run", "--json", "--html", tmp_path / "page.html") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "broken"
    assert [found["tokens"][name] for name in ("absurd", "rms_diff", "max_abs_diff")] == [0, 2000.0, 2000.0]
    assert found["tokens"]["ess"] == pytest.approx(0 if sign == 1 else 1)


def test_quantiles_are_in_the_bin_of_the_true_one(run):
    _, made, state = run
    d = np.sort(np.concatenate([plain.tokens_of(each)["d"] for each in made]))
    found = measure.token_metrics(state)
    for q in measure.QUANTILES:
        true = np.sort(np.abs(d))[int(np.ceil(q * len(d))) - 1]
        assert found[f"abs_diff_p{100 * q:g}"] == pytest.approx(true, rel=0.0625)
    for q in (0.01, 0.5, 0.99):
        assert found[f"diff_p{100 * q:g}"] == pytest.approx(d[int(np.ceil(q * len(d))) - 1], rel=0.0625)


def test_sequence_metrics(run):
    _, made, state = run
    expected = plain.sequence_metrics(made)
    found = measure.sequence_metrics(state)
    assert found["sequences"] == expected.pop("sequences") > 20
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name  # weights are exponentials of sums over thousands of tokens


@pytest.mark.parametrize("name", SLICES)
def test_slices(run, name):
    _, made, state = run
    expected = plain.sliced(made, name)
    rows = measure.slices(state)[name]
    assert {row["value"]: row["tokens"] for row in rows} == {key: each["tokens"] for key, each in expected.items()}
    for row in rows:
        agree(row, expected[row["value"]], max(expected[row["value"]]["abs_diff"], 1e-7))


def test_token_ids(run):
    _, made, state = run
    expected = plain.sliced(made, "token_id")
    rows = measure.worst_token_ids(state, most=1000)
    assert {row["token_id"]: row["tokens"] for row in rows} == {key: each["tokens"] for key, each in expected.items()}
    for row in rows:
        agree(row, {name: expected[row["token_id"]][name] for name in ("abs_diff", "mean_diff", "kl_k3")}, 0.01)
    mean = measure.token_metrics(state)["abs_diff"]
    drawn = {key: (each["abs_diff"] * each["tokens"] + 100 * mean) / (each["tokens"] + 100) for key, each in expected.items()}
    assert [row["token_id"] for row in rows[:5]] == sorted(drawn, key=drawn.get, reverse=True)[:5]


def test_slices_of_a_long_response_nearly_all_of_whose_tokens_are_alike(tmp_path):
    """Most tokens share their slots, none is far off but a few, some ids have no slice."""
    random = np.random.default_rng(5)
    sample = make_sample(random, 1, 0, 7, 20_011, 1)
    total = len(sample.token_id)
    sample.flags[7:], sample.loss_mask[7:] = Flag.GENERATED, 1
    sample.rollout_logprob[7:] = -random.exponential(0.02, total - 7)
    sample.token_id[random.integers(0, total, 50)] = 2 * VOCABULARY
    train = make_train(random, sample, 0.0)
    train["train_logprob"] += random.normal(0, 1e-3, total).astype(np.float32)
    train["train_logprob"][random.integers(7, total, 5)] -= 2
    train["entropy"][7:] = random.exponential(0.05, total - 7)
    train["route_miss"][7:] = (random.random(total - 7) < 0.01) * random.integers(1, 60, total - 7)
    train["advantage"][7:], train["used"][7:] = 1.0, 1
    made = [Made(1, sample, train, 0, -1, 0, 0, 1)]
    write_run(tmp_path, made)
    state = analyze(tmp_path, Alone())
    for name in ("rollout_probability", "entropy", "layers_routed_differently", "position"):
        expected, rows = plain.sliced(made, name), measure.slices(state)[name]
        assert {row["value"]: row["tokens"] for row in rows} == {key: each["tokens"] for key, each in expected.items()}
        for row in rows:
            wanted = expected[row["value"]]
            agree(row, {key: wanted[key] for key in ("abs_diff", "mean_diff", "rms_diff", "kl_k3", "ratio_mean", "equal_share")}, wanted["abs_diff"])
    by_id = {key: each for key, each in plain.sliced(made, "token_id").items() if key < VOCABULARY}
    rows = measure.worst_token_ids(state, most=1000)
    assert {row["token_id"]: row["tokens"] for row in rows} == {key: each["tokens"] for key, each in by_id.items()}
    for row in rows:
        agree(row, {name: by_id[row["token_id"]][name] for name in ("abs_diff", "mean_diff", "kl_k3")}, 0.001)


def test_worst_tokens_and_first_divergence(run):
    _, made, state = run
    every = []
    first = {tau: [] for tau in (0.0, 1e-6, 1e-3, 0.1)}
    for each in made:
        part = plain.tokens_of(each)
        size = np.abs((part["d"]).astype(np.float32))
        every += [(-value, each.step, each.shard, each.row, place) for value, place in zip(size.tolist(), part["at"].tolist(), strict=True)]
        for tau, found in first.items():
            if len(size):
                over = part["at"][np.abs(part["d"]) > tau]
                found.append(int(over[0]) if len(over) else None)
    worst = sorted(every)[:20]
    assert [row[1:] for row in state.worst.tolist()] == [row[1:] for row in worst]
    assert [row[0] for row in state.worst.tolist()] == pytest.approx([-row[0] for row in worst])
    for row in measure.first_divergence(state):
        starts = first[row["threshold"]]
        assert row["never"] == starts.count(None)
        assert sum(row["positions"].values()) == len(starts) - starts.count(None)


def test_intervals_hold_the_mean_and_are_as_wide_as_resampling_says(tmp_path):
    made = random_run(tmp_path, seed=5, steps=12, longest=300)
    state = analyze(tmp_path, Alone())
    parts = [plain.tokens_of(each)["d"] for each in made]
    random = np.random.default_rng(0)
    means = []
    for _ in range(1000):
        chosen = [parts[i] for i in random.integers(0, len(parts), len(parts))]
        means.append(np.abs(np.concatenate(chosen)).mean())
    low, high = measure.intervals(state)["abs_diff"]
    assert low < measure.token_metrics(state)["abs_diff"] < high
    assert high - low == pytest.approx(np.quantile(means, 0.975) - np.quantile(means, 0.025), rel=0.4)


def test_core_pass_has_the_bits_of_the_whole_one_where_it_says_the_same(run):
    folder, _, state = run
    core = measure.token_metrics(analyze(folder, Alone(), core=True, chunk=4000), core=True)
    whole = measure.token_metrics(state)
    assert "slope" not in core
    assert {name: whole[name] for name in core} == pytest.approx(core, rel=1e-6)
    assert core["tokens"] == whole["tokens"]


@pytest.mark.parametrize("kind", ["empty", "masked", "one token"])
def test_little_or_no_data(tmp_path, kind):
    random = np.random.default_rng(1)
    sample = make_sample(random, 1, 0, 5, {"empty": 0, "masked": 30, "one token": 1}[kind], 1)
    sample.loss_mask[:] = kind == "one token"
    made = [Made(1, sample, make_train(random, sample, 0.01), 0, -1, 0, 0, 1)]
    write_run(tmp_path, made)
    state = analyze(tmp_path, Alone())
    found = measure.token_metrics(state)
    if kind == "one token":
        assert found["masked"] == 6  # the prompt's tokens have no log-prob: they are under this mask and can't be compared
        assert (found["tokens"], measure.counts_of(state)["rollout_nan"], found["slope"], found["pearson"]) == (1, 5, None, None)
    else:
        assert found == {"masked": 0, "tokens": 0, "equal_bits": 0, "not_comparable": 0, "absurd": 0}
        assert measure.sequence_metrics(state) == {"sequences": 0}
        assert all(rows is None for rows in measure.slices(state).values())
