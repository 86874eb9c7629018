"""The planted causes are what they say, by computations of their own: in float64, and on what the run directory holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from planted import BF16_NOISE, CAUSES, FP32_NOISE, NO_NOISE, PAIRS, Planted, plant
from planted.arithmetic import bits_of, rounded
from planted.model import HEADS, HIDDEN, LAYERS, SIZE, SLOPES, TOP_K, VOCABULARY, Weights
from planted.sampling import Sampler, Speculation, draw
from planted.vocabulary import STOP, STRINGS, retokenised, text_of

SMALL = {"steps": 2, "sequences": 16, "response": 24}


def small(folder: Path, cause: str | tuple[str, ...], magnitude: float | tuple[float, ...], seed: int = 3, noise: float = NO_NOISE, **more: object) -> Planted:
    """A small run without noise, so that what differs is the cause's."""
    return plant(folder, cause, magnitude, seed, noise=noise, keep_logits=True, **(SMALL | more))


def used(planted: Planted) -> np.ndarray:
    """Generated tokens, bool [S, T]."""
    return planted.generated.generated


def difference(planted: Planted) -> np.ndarray:
    """train − rollout log-prob of all generated tokens, float64 [S, T], NaN elsewhere."""
    return np.where(used(planted), planted.trained.logprob.astype(np.float64) - planted.generated.logprob, np.nan)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def drawn(planted: Planted) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every generated token: the engine's logits f32 [N, V], its id [N], the log-prob as reported [N]."""
    made = planted.generated
    assert made.logits is not None
    return made.logits[used(planted)], made.token[used(planted)], made.logprob[used(planted)]


def of_token(logprobs: np.ndarray, token: np.ndarray) -> np.ndarray:
    return np.take_along_axis(logprobs, token[:, None].astype(np.int64), 1)[:, 0]


def test_causes_of_no_size_leave_equal_bits_alone_and_together(tmp_path: Path) -> None:
    for causes in (("clean",), tuple(CAUSES)):
        made = small(tmp_path / causes[-1], causes, (0.0,) * len(causes))
        assert np.array_equal(made.trained.logprob[used(made)].view(np.int32), made.generated.logprob[used(made)].view(np.int32))


def test_magnitudes_fall_to_nothing() -> None:
    for name, cause in CAUSES.items():
        sizes = np.abs(cause.magnitudes)
        assert sizes[-1] == 0, name
        assert (np.diff(sizes) < 0).all(), name


def test_both_causes_of_a_pair_are_in_the_pipeline(tmp_path: Path) -> None:
    assert ("temperature", "top_p") in PAIRS
    assert not {("temperature", "temperature_low"), ("clean", "lag"), ("engine", "engine_tensor")} & set(PAIRS)
    made = small(tmp_path, ("temperature", "top_p"), (0.25, 0.3))
    logits, token, reported = drawn(made)
    for row in range(0, len(token), 7):
        probability = np.exp(log_softmax(logits[row].astype(np.float64) / 1.25))
        order = np.argsort(-probability, kind="stable")
        kept = order[np.cumsum(probability[order]) - probability[order] <= 0.7]
        assert token[row] in kept
        assert reported[row] == pytest.approx(np.log(probability[token[row]] / probability[kept].sum()), abs=1e-5)


@pytest.mark.parametrize("cause", ["retokenised", "other_prompt", "lag", "routing", "routing_next"])
def test_a_strong_cause_is_seen_in_the_numbers(cause: str, tmp_path: Path) -> None:
    made = small(tmp_path, cause, CAUSES[cause].magnitudes[0], noise=BF16_NOISE)
    noise = small(tmp_path / "noise", "clean", 0.0, noise=BF16_NOISE)
    assert np.nanmean(difference(made) ** 2) > 3 * np.nanmean(difference(noise) ** 2)


@pytest.mark.parametrize("temperature", [0.8, 1.25])
def test_temperature_divides_the_logits(temperature: float, tmp_path: Path) -> None:
    made = small(tmp_path, "temperature", temperature - 1)
    logits, token, reported = drawn(made)
    np.testing.assert_allclose(reported, of_token(log_softmax(logits.astype(np.float64) / temperature), token), rtol=0, atol=1e-5)
    np.testing.assert_allclose(made.trained.logprob[used(made)], of_token(log_softmax(logits), token), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, 0), (0.95, 0), (1.0, 3), (0.8, 5)])
def test_filtered_logprobs_are_renormalised_within_what_is_kept(top_p: float, top_k: int, tmp_path: Path) -> None:
    causes, sizes = (("top_p", "top_k"), (1 - top_p, 1 / top_k)) if top_k else (("top_p",), (1 - top_p,))
    made = small(tmp_path, causes, sizes)
    logits, token, reported = drawn(made)
    mass = made.generated.kept_mass[used(made)]
    for row in range(0, len(token), 7):
        probability = np.exp(log_softmax(logits[row]))
        order = np.argsort(-probability, kind="stable")
        count = min(int((np.cumsum(probability[order]) - probability[order] <= top_p).sum()), top_k or VOCABULARY)
        kept = order[:count]
        assert token[row] in kept
        assert reported[row] == pytest.approx(np.log(probability[token[row]] / probability[kept].sum()), abs=1e-5)
        assert mass[row] == pytest.approx(probability[kept].sum(), abs=1e-5)
    assert (difference(made)[used(made)] <= 1e-5).all()  # renormalising only makes the engine's greater
    np.testing.assert_allclose(difference(made)[used(made)], np.log(mass), atol=1e-5)


def test_a_harmless_filter_is_in_the_tokens_and_not_in_the_logprobs(tmp_path: Path) -> None:
    made = small(tmp_path, "clean_top_p", 0.5)
    assert (difference(made)[used(made)] == 0).all()
    assert (made.generated.kept_mass[used(made)] < 0.99).mean() > 0.5


@pytest.mark.parametrize("bits", [7, 10])
def test_bf16_logits_are_what_a_cast_gives(bits: int, tmp_path: Path) -> None:
    made = small(tmp_path, "bf16_logits", 2.0 ** -(bits + 1))
    logits, token, reported = drawn(made)
    cast = rounded(torch.from_numpy(logits), bits).numpy()
    assert (cast.view(np.int32) & ((1 << (23 - bits)) - 1) == 0).all()  # every logit is representable
    spacing = 2.0 ** (np.floor(np.log2(np.abs(logits))) - bits)
    assert (np.abs(cast - logits) <= spacing / 2).all()  # the nearest one that is
    np.testing.assert_allclose(reported, of_token(log_softmax(cast), token), atol=2e-5)
    shift = difference(made)[used(made)] - of_token(logits - cast, token)  # what is left is the change of the normaliser, common to a row
    assert np.abs(shift).max() < spacing.max()


def test_bf16_logprobs_and_a_bf16_trainer(tmp_path: Path) -> None:
    made = small(tmp_path / "a", "bf16_logprob", 2.0**-8)
    assert (made.generated.logprob[used(made)].view(np.int32) & 0xFFFF == 0).all()
    logits, token, _ = drawn(made := small(tmp_path / "b", "bf16_trainer", 2.0**-8))
    cast = torch.from_numpy(logits).bfloat16().float().numpy()
    np.testing.assert_allclose(made.trained.logprob[used(made)], of_token(log_softmax(cast), token), atol=2e-5)


def reference_logits(weights: Weights, token: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """The model in float64 numpy, one sequence: token [T], experts [T, LAYERS, TOP_K] -> logits [T, V]."""
    w = {name: tensor[0].double().numpy() for name, tensor in weights.items()}
    x, place = w["embed"][token], np.arange(len(token))
    normal = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
    for layer in range(LAYERS):
        qkv = (normal(x) @ w[f"{layer}.qkv"]).reshape(-1, 3, HEADS, SIZE)
        mixed = np.zeros((len(token), HEADS, SIZE))
        for head in range(HEADS):
            q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
            scores = q @ k.T / np.sqrt(SIZE) - float(SLOPES[head]) * (place[:, None] - place)
            scores[place[:, None] < place] = -np.inf
            mixed[:, head] = np.exp(log_softmax(scores)) @ v
        x = x + mixed.reshape(-1, HIDDEN) @ w[f"{layer}.out"]
        h = normal(x)
        routing, up = h @ w[f"{layer}.router"], w[f"{layer}.up"]
        width = up.shape[1] // 2 // routing.shape[1]
        made = np.zeros_like(x)
        for t in range(len(token)):
            chosen = experts[t, layer].astype(int)
            share = np.exp(log_softmax(routing[t, chosen]))
            for expert, part in zip(chosen, share, strict=True):
                at = slice(expert * width, (expert + 1) * width)
                gate, value = h[t] @ up[:, at], h[t] @ up[:, up.shape[1] // 2 :][:, at]
                made[t] += part * (gate / (1 + np.exp(-gate)) * value) @ w[f"{layer}.down"][at]
        x = x + made
    return normal(x) @ w["head"]


def reference_difference(made: Planted, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Trainer's log-probs of one sequence in float64, by its weights, tokens and experts; and what was recorded; of tokens 1 to length."""
    length = int(made.trained.length[row])
    token = made.trained.token[row, :length]
    logits = reference_logits(made.policy.versions[12 + int(made.scene.step[row])], token, made.trained.experts[row])
    return of_token(log_softmax(logits[:-1]), token[1:]), made.trained.logprob[row, 1:length]


@pytest.mark.parametrize(
    ("cause", "magnitude", "noise"),
    [("clean", 0.0, NO_NOISE), ("clean", 0.0, FP32_NOISE), ("retokenised", 0.2, NO_NOISE), ("routing", 0.5, FP32_NOISE), ("other_prompt", 1.0, FP32_NOISE)],
)
def test_the_trainers_logprobs_are_the_models(cause: str, magnitude: float, noise: float, tmp_path: Path) -> None:
    made = small(tmp_path, cause, magnitude, noise=noise)
    for row in (0, 13, 31):
        expected, found = reference_difference(made, row)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_noise_falls_with_its_roundoff(tmp_path: Path) -> None:
    size = {noise: np.nanmean(np.abs(difference(small(tmp_path / str(noise), "clean", 0.0, noise=noise)))) for noise in (2.0**-6, BF16_NOISE, 2.0**-11, FP32_NOISE)}
    assert 3e-3 < size[BF16_NOISE] < 0.06
    assert 3 < size[2.0**-6] / size[BF16_NOISE] < 5
    assert 6 < size[BF16_NOISE] / size[2.0**-11] < 10
    assert 0 < size[FP32_NOISE] < 1e-5


def test_shifted_logprobs_are_those_of_the_next_token(tmp_path: Path) -> None:
    right, wrong = small(tmp_path / "a", "clean", 0.0), small(tmp_path / "b", "shifted", 0.5)
    assert np.array_equal(right.generated.token, wrong.generated.token)
    early = ~(wrong.trained.logprob[:, 1] == right.trained.logprob[:, 1])
    assert 0.2 < early.mean() < 0.8
    for row, length in enumerate(wrong.generated.length):
        found, true = wrong.trained.logprob[row, :length], right.trained.logprob[row, :length]
        assert np.array_equal(found[1:-1] if early[row] else found[1:], true[2:] if early[row] else true[1:])


@pytest.mark.parametrize(("cause", "magnitude"), [("engine", 4.0), ("engine_tensor", 0.5), ("rank", 0.5), ("node", 0.5)])
def test_only_the_stale_copy_is_off(cause: str, magnitude: float, tmp_path: Path) -> None:
    made = small(tmp_path, cause, magnitude, steps=4)
    (stale,) = made.pipeline.engines + made.pipeline.ranks
    copy = made.scene.engine if cause.startswith("engine") else made.rank
    off = np.isin(copy, stale.copies) & (made.scene.step >= stale.first) & (made.scene.step <= stale.last)
    differs = np.array([(row[~np.isnan(row)] != 0).mean() for row in difference(made)])
    assert (differs[off] > 0.9).all()
    assert (differs[~off] == 0).all()
    assert len(stale.copies) == (2 if cause == "node" else 1)


def test_a_rank_and_its_node_may_both_be_off(tmp_path: Path) -> None:
    made = small(tmp_path, ("rank", "node"), (0.5, 0.5), steps=3)
    off = np.zeros(len(made.rank), bool)
    for stale in made.pipeline.ranks:
        off |= np.isin(made.rank, stale.copies) & (made.scene.step >= stale.first) & (made.scene.step <= stale.last)
    differs = np.array([(row[~np.isnan(row)] != 0).mean() for row in difference(made)])
    assert len(made.pipeline.ranks) == 2
    assert (differs[off] > 0.9).all()
    assert (differs[~off] == 0).all()


def test_lag_is_zero_where_none_is_recorded_and_grows_with_it(tmp_path: Path) -> None:
    made = small(tmp_path, "lag", 1.0, steps=6, sequences=16)
    size: dict[int, list[float]] = {}
    for row, values in enumerate(difference(made)):
        lags = made.scene.lag[row // made.scene.rows]
        for place in np.flatnonzero(~np.isnan(values)):
            lag = next(lag for start, lag in reversed(lags) if start <= place - 1)
            if len(lags) == 1:  # a cache from older weights stays in the others
                size.setdefault(lag, []).append(float(values[place] ** 2))
    mean = {lag: np.mean(values) for lag, values in sorted(size.items())}
    assert len(mean) >= 3
    assert mean[0] == 0
    assert sorted(mean.values()) == list(mean.values())


def test_a_share_of_the_tokens_is_routed_otherwise(tmp_path: Path) -> None:
    for cause in ("routing", "routing_next"):
        made = small(tmp_path / cause, cause, 0.25)
        inside = np.arange(made.generated.token.shape[1]) < made.generated.length[:, None] - 1
        same = made.trained.experts == made.generated.order[..., :TOP_K]
        rerouted = ~same.all((-1, -2))[inside]
        assert 0.2 < rerouted.mean() < 0.3
        if cause == "routing_next":
            assert (made.trained.experts == made.generated.order[..., [0, 2]])[inside][rerouted].all()


def test_retokenising_keeps_the_text_and_changes_ids() -> None:
    rng = np.random.default_rng(0)
    token = rng.integers(STOP, VOCABULARY, 400).astype(np.int32)
    other = retokenised(token, 20, 0.1, rng)
    assert text_of(other) == text_of(token)
    assert np.array_equal(other[:20], token[:20])
    assert not np.array_equal(other, token)
    assert np.array_equal(retokenised(token, 20, 0.0, rng), token)
    assert len(set(STRINGS[STOP:])) == VOCABULARY - STOP


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(top_p=0.8), Sampler(temperature=1.5, top_k=6)])
def test_speculation_keeps_the_distribution(sampler: Sampler) -> None:
    torch.manual_seed(0)
    logits, draft = torch.randn(2, 12) * 2
    target, proposal = sampler.distribution(logits)[1], sampler.distribution(draft)[1]
    count = 10_000
    speculation = Speculation(torch.ones(count, dtype=torch.bool))
    uniform = torch.from_numpy(np.random.default_rng(1).random((4, 3, count)))
    found = []
    for each in uniform:
        token, accepted, other = speculation.draw(target.expand(count, -1), proposal.expand(count, -1), each)
        assert bool((accepted ^ other).all())
        found.append(token)
    share = torch.bincount(torch.cat(found), minlength=12) / (4 * count)
    assert (share[target == 0] == 0).all()
    np.testing.assert_allclose(share, target, atol=0.012)
    assert 0.1 < float(accepted.float().mean()) < 0.95


def test_drawing_never_takes_what_has_no_weight() -> None:
    weight = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(weight.expand(5, -1), uniform).tolist() == [1, 1, 3, 3, 3]


def test_rounding_is_to_the_nearest() -> None:
    x = torch.randn(10_000) * 10
    assert torch.equal(rounded(x, 10), x.half().float())  # of numbers in fp16's range
    assert torch.equal(rounded(x, 7), x.bfloat16().float())
    assert torch.equal(rounded(x, 23), x)
    assert [bits_of(size) for size in (2.0**-8, 2.0**-11, 2.0**-24, 0.0)] == [7, 10, 23, 23]


def test_the_same_seed_writes_the_same_numbers_and_another_does_not(tmp_path: Path) -> None:
    made = [small(tmp_path / str(index), ("lag", "routing"), (1.0, 0.1), seed, noise=BF16_NOISE) for index, seed in enumerate((5, 5, 6))]
    for name in ("token", "logprob"):
        first, again, other = (getattr(each.generated, name) for each in made)
        assert np.array_equal(first, again, equal_nan=True)
        assert not np.array_equal(first, other, equal_nan=True)
    assert np.array_equal(made[0].trained.logprob, made[1].trained.logprob, equal_nan=True)


def test_entropies_run_from_sure_to_unsure(tmp_path: Path) -> None:
    made = small(tmp_path, "clean", 0.0, sequences=32)
    logits, _, _ = drawn(made)
    expected = -(np.exp(log_softmax(logits)) * log_softmax(logits)).sum(-1)
    np.testing.assert_allclose(made.trained.entropy[used(made)], expected, atol=1e-4)
    low, middle, high = np.quantile(expected, [0.05, 0.5, 0.95])
    assert low < 0.2 < middle < 2 < high
