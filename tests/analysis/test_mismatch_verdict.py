"""The verdict's bounds: what is called biased is beyond chance, whatever the number of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from made_runs import Made, make_sample, make_train, write_run
from planted import plant

from miles.analysis import measure
from miles.analysis.analyze import analyze
from miles.analysis.causes import attribute
from miles.analysis.ranks import Alone
from miles.analysis.verdict import judge


def judged(folder):
    state = analyze(folder, Alone())
    return judge(measure.token_metrics(state), measure.standard_errors(state), attribute(state.evidence))


@pytest.mark.parametrize(("seed", "size"), [(10, 2.0**-16), (28, 2.0**-8), (7, 2.0**-7)])
def test_a_short_clean_run_is_noise(tmp_path, seed, size):
    """Seeds whose mean ratio lies beyond its 95 % interval, as in one clean run of twenty."""
    plant(tmp_path, "noise", size, seed, steps=1, sequences=16, response=24)
    assert judged(tmp_path).word == "noise"


def one_sided(folder, sequences, tokens, shift):
    random, made = np.random.default_rng(3), []
    for draw in range(sequences):
        sample = make_sample(random, draw, 0, 5, tokens, 1)
        train = make_train(random, sample, 0.0)
        train["train_logprob"] = (sample.rollout_logprob + random.normal(shift, 0.03, len(sample.token_id))).astype(np.float32)
        train["route_miss"][:] = 0
        made.append(Made(1, sample, train, 0, -1, 0, 0, 1))
    write_run(folder, made)


def test_a_shift_beyond_chance_is_biased_and_one_sequence_says_nothing(tmp_path):
    one_sided(tmp_path / "many", 24, 400, -0.004)
    verdict = judged(tmp_path / "many")
    assert verdict.word == "biased"
    assert "one-sided" in verdict.why[0]
    one_sided(tmp_path / "one", 1, 400, -0.004)
    assert measure.standard_errors(analyze(tmp_path / "one", Alone())) == {}
    assert "one-sided" not in " ".join(judged(tmp_path / "one").why)


def test_a_slope_is_off_only_beyond_its_error():
    tokens = {"tokens": 200, "masked": 200, "equal_bits": 0, "not_comparable": 0, "absurd": 0, "kl_k3": 1e-3, "ratio_mean": 1.0, "ess": 1.0, "slope": 0.985, "pearson": 0.9995}
    assert judge(tokens, {}).word == "noise"
    verdict = judge(tokens | {"tokens": 20_000, "masked": 20_000}, {})
    assert verdict.word == "biased"
    assert "slope" in verdict.why[0]


def test_lag_that_matters_is_no_noise(tmp_path):
    """Half of the tokens are the last policy's: training is not on the policy that generated them."""
    plant(tmp_path, "lag", 1.0, 3, steps=3, sequences=32, response=64)
    verdict = judged(tmp_path)
    assert verdict.word == "biased"
    assert "policy lag" in " ".join(verdict.why)
