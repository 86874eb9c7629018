"""Counters and integer sums at their limits: nothing overflows, and a sum has the same digits however it was reached."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from made_runs import Made, make_sample, make_train, write_run

from miles.analysis import exact
from miles.analysis.analyze import analyze
from miles.analysis.bootstrap import resample
from miles.analysis.core_pass import core
from miles.analysis.distinct import distinct
from miles.analysis.ranks import Alone
from miles.analysis.state import VOCABULARY, ByToken
from miles.analysis.terms import BINS, CORE, COUNTS, HUGE, LIMIT, NEAR, NEAR_UNIT, SUMS, TOKEN_VALUES


@pytest.mark.parametrize("lengths", [[700_001], [350_000, 17, 349_984]])
def test_more_equal_tokens_than_a_counter_of_16_bits_holds(lengths):
    total = sum(lengths)
    mu, o, mask = np.full(total, -1.0, np.float32), np.full(total, -1.5, np.float32), np.ones(total, np.uint8)
    start = np.cumsum([0, *lengths[:-1]])
    sums, counts, histogram = np.zeros(len(SUMS)), np.zeros(len(COUNTS), np.int64), np.zeros(BINS, np.int64)
    assert core(mu, o, mask, start, start, np.array(lengths), sums, counts, histogram) == 0.5
    assert counts.tolist() == [total, total, 0]
    bin = int(np.array([-0.5], np.float32).view(np.uint32)[0] >> 19)
    assert np.flatnonzero(histogram).tolist() == [bin]
    assert histogram[bin] == total
    assert sums[:3] == pytest.approx([-0.5 * total, 0.5 * total, 0.25 * total], rel=1e-7)


def test_totals_of_odd_tokens_and_ends_of_any_length_are_those_of_numpy():
    random = np.random.default_rng(3)
    lengths = np.array([1, 63, 64, 65, 0, 1000, 60_000])
    total, start = int(lengths.sum()), np.cumsum([0, *lengths[:-1]])
    mu = -random.exponential(1, total).astype(np.float32)
    o = (mu + random.normal(0, 0.02, total) * np.exp(random.normal(0, 1.5, total))).astype(np.float32)
    mask = (random.random(total) < 0.9) * random.integers(1, 255, total).astype(np.uint8)
    for array in (mu, o):
        for value in (np.nan, np.inf, -np.inf, 1e30, -2000, -999.9, -0.0, 0.0):
            array[random.integers(0, total, 20)] = value
    alike, edge = random.integers(0, total, total // 4), random.integers(0, total, 20)
    o[alike] = mu[alike]
    mu[edge], o[edge] = -999.9, -1000.05  # near each other, and only one of them may count
    sums, counts, histogram = np.zeros(len(SUMS)), np.zeros(len(COUNTS), np.int64), np.zeros(BINS, np.int64)
    top = core(mu, o, mask, start, start, lengths, sums, counts, histogram)
    kept = (mask != 0) & (np.abs(mu) <= HUGE) & (np.abs(o) <= HUGE)
    d = o[kept] - mu[kept]
    wide = d.astype(np.float64)
    c = np.clip(wide, -LIMIT, LIMIT)
    t = np.expm1(c)
    assert counts.tolist() == [np.count_nonzero(mask), kept.sum(), (mu.view(np.int32) == o.view(np.int32))[kept].sum()]
    assert histogram.tolist() == np.bincount(d.view(np.uint32) >> 19, minlength=BINS).tolist()
    assert top == np.abs(d).max()
    assert sums[0] == pytest.approx(wide.sum(), abs=1e-7 * np.abs(wide).sum())
    assert sums[1 : len(CORE)] == pytest.approx([np.abs(wide).sum(), (wide**2).sum(), (t - c).sum(), t.sum(), (t**2).sum()], rel=3e-7)


def test_sums_by_token_have_the_same_digits_however_they_were_reached():
    random = np.random.default_rng(0)
    units = np.array([NEAR_UNIT[name] for name in TOKEN_VALUES])
    ids, values = random.integers(0, 50, 4000), random.integers(-(1 << 38), 1 << 38, (4000, len(TOKEN_VALUES)))
    values[:, 0] = 1
    far, large = random.integers(0, 50, 100), random.normal(0, 1e20, (100, len(TOKEN_VALUES)))
    found = []
    for pieces in (1, 7):
        states = []
        for part in np.array_split(np.arange(4000), pieces):
            state = ByToken()
            table, near = state.table(4000)
            assert near == NEAR
            np.add.at(table, ids[part], values[part])
            states.append(state)
        for which in range(100):
            states[which % pieces].add(far[which : which + 1], large[which : which + 1])
        for other in states[1:]:
            states[0].merge(other.ids, other.digits[: len(other.ids)])
        found.append({int(name): states[0].digits[row].tobytes() for row, name in enumerate(states[0].ids)})
    assert found[0] == found[1]
    for name, digits in found[0].items():
        sums = exact.value(np.frombuffer(digits, np.int64).reshape(len(TOKEN_VALUES), -1))
        for w, unit in enumerate(units):
            true = int(values[ids == name, w].sum()) * Fraction(unit) + sum((Fraction(x) for x in large[far == name, w]), Fraction(0))
            assert sums[w] == float(true)


def test_a_table_by_token_is_folded_before_it_could_overflow():
    state = ByToken()
    table, _ = state.table(1 << 20)
    half = int(2.0**61)
    table[0] = [1, half, -half, half]
    state.added(half * NEAR_UNIT["abs"], half * NEAR_UNIT["k3"])
    again, near = state.table(1 << 20)
    assert again is table
    assert (near, table[0, 1]) == (NEAR, half)
    state.added(half * NEAR_UNIT["abs"], half * NEAR_UNIT["k3"])
    state.table(1 << 20)
    assert not table.any()
    assert exact.value(state.digits[:1])[0].tolist() == [1.0, half * NEAR_UNIT["abs"], -half * NEAR_UNIT["d"], half * NEAR_UNIT["k3"]]
    assert state.table(1 << 30)[1] < 0  # so many tokens have no room: each is added by itself


def test_few_and_many_distinct_numbers_are_told_apart():
    random = np.random.default_rng(1)
    keys = np.stack([
        np.zeros(3000, np.int64), random.integers(0, 4, 3000), random.integers(-(1 << 63), 1 << 62, 3000), random.integers(-2, 2000, 3000) << 32
    ])  # fmt: skip
    values, places = distinct(keys)
    assert values == [list(dict.fromkeys(row)) for row in keys.tolist()]  # in the order met
    together = [(k, value) for k, found in enumerate(values) for value in found]
    assert [[together[place] for place in row] for row in places.tolist()] == [[(k, key) for key in row] for k, row in enumerate(keys.tolist())]
    assert distinct(np.zeros((1, 0), np.int64))[0] == [[]]


def test_token_ids_that_no_vocabulary_has_are_in_no_table(tmp_path):
    random = np.random.default_rng(2)
    sample = make_sample(random, 1, 0, 3, 60, 1)
    sample.loss_mask[:], sample.loss_mask[3:] = 0, 1
    sample.token_id[3:] = np.resize([7, -1, VOCABULARY - 1, VOCABULARY, -(1 << 31), (1 << 31) - 1], 60)
    train = make_train(random, sample, 1.0)  # near and far ones
    write_run(tmp_path, [Made(1, sample, train, 0, -1, 0, 0, 1)])
    state = analyze(tmp_path, Alone())
    assert state.counts[COUNTS.index("tokens")] == 60
    count = {int(name): exact.value(state.tokens.digits[row])[0] for row, name in enumerate(state.tokens.ids)}
    assert count == {7: 10, VOCABULARY - 1: 10}


def test_replicates_take_sequences_as_poisson_does_by_their_hashes():
    whole, replicates, n = 1 << 64, 200, 2000
    reach = np.cumsum([math.exp(-1.0) / math.factorial(times) for times in range(12)])
    expected = np.zeros((3, replicates))
    found, times = np.zeros((3, replicates)), np.empty(replicates)
    random = np.random.default_rng(3)
    taken = []
    for identity, value in zip(random.integers(0, 1 << 63, n).tolist(), random.normal(0, 1, (n, 3)), strict=True):
        resample(np.uint64(identity), value, found, times)
        for k in range(0, replicates, 40):  # splitmix64, in integers of any size
            z = (identity + (k + 1) * 0x9E3779B97F4A7C15) % whole
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % whole
            z = (z ^ z >> 27) * 0x94D049BB133111EB % whole
            assert times[k] == np.searchsorted(reach, ((z ^ z >> 31) >> 11) / (1 << 53), "right")
        expected += times * value[:, None]
        taken.append(times.copy())
    assert (found == expected).all()
    assert np.mean(taken) == pytest.approx(1.0, abs=0.01)
    assert np.var(taken) == pytest.approx(1.0, abs=0.02)


def test_large_differences_that_cancel_are_added_in_fp64():
    random, total = np.random.default_rng(6), 64 * 50
    mu, o = (-random.uniform(0, 900, total).astype(np.float32) for _ in range(2))
    mask, start = np.ones(total, np.uint8), np.zeros(1, np.int64)
    sums, counts, histogram = np.zeros(len(SUMS)), np.zeros(len(COUNTS), np.int64), np.zeros(BINS, np.int64)
    core(mu, o, mask, start, start, np.array([total]), sums, counts, histogram)
    wide = (o - mu).astype(np.float64)
    assert sums[0] == pytest.approx(wide.sum(), abs=1e-14 * np.abs(wide).sum())


SUMS_HERE = """
import numpy as np
from miles.analysis.core_pass import core
from miles.analysis.terms import BINS, COUNTS, SUMS
random, total = np.random.default_rng(5), 5000
mu = -random.exponential(1, total).astype(np.float32)
o = (mu + random.normal(0, 0.02, total) * np.exp(random.normal(0, 1.5, total))).astype(np.float32)
mask, start = (random.random(total) < 0.9).astype(np.uint8), np.zeros(1, np.int64)
sums, counts, histogram = np.zeros(len(SUMS)), np.zeros(len(COUNTS), np.int64), np.zeros(BINS, np.int64)
core(mu, o, mask, start, start, np.array([total]), sums, counts, histogram)
print(sums.tobytes().hex(), counts.tolist(), np.flatnonzero(histogram).tolist())
"""


def test_other_processors_have_the_same_bits():
    """Numba's variables choose them: one without vectors of 16, and one without any but the oldest."""
    said = [
        subprocess.run([sys.executable, "-c", SUMS_HERE], env={**os.environ, **more}, capture_output=True, text=True, timeout=300)
        for more in ({}, {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx"}, {"NUMBA_CPU_NAME": "generic"})
    ]
    assert [each.returncode for each in said] == [0, 0, 0], [each.stderr[-500:] for each in said]
    assert {each.stdout for each in said} == {said[0].stdout}
