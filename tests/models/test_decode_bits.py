"""A decode step over a KV cache has the same bits as the packed forward, for each family, whatever else is in flight."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from miles.models.forward import CachedContext, PackedContext, forward
from miles.models.load import build_model
from miles.precision.attention import KVCache
from miles.precision.logprob import sample, token_logprob
from miles.precision.threads import set_threads

VOCABULARY, LAYERS, KV_HEADS, HEAD_DIM = 331, 3, 2, 32


def config_of(family: str, **changes) -> PretrainedConfig:
    common = {
        "hidden_size": 72, "intermediate_size": 112, "num_hidden_layers": LAYERS, "num_attention_heads": 6, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "initializer_range": 0.15,
    }  # fmt: skip
    if family == "llama":
        return LlamaConfig(**common, tie_word_embeddings=True, **changes)
    if family == "qwen2":  # biases on q, k, v
        return Qwen2Config(**{**common, "hidden_size": 192}, **changes)
    if family == "qwen3":
        return Qwen3Config(**common, tie_word_embeddings=False, **changes)
    return Qwen3MoeConfig(**common, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True, **changes)


def model_of(family: str, seed: int, **changes):
    torch.manual_seed(seed)
    model = build_model(config_of(family, **changes), batch_invariant=True)
    with torch.no_grad():  # initial biases are 0 and norms 1: give them something to do
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.add_(torch.randn_like(p) * 0.2)
    return model


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    set_threads(request.param)
    yield request.param
    set_threads(before)


def packed(model, sequences, **changes):
    ends = [0, *itertools.accumulate(len(s) for s in sequences)]
    context = PackedContext(cu_seqlens=torch.tensor(ends, dtype=torch.int32), **changes)
    position = torch.cat([torch.arange(len(s)) for s in sequences])
    return forward(model, torch.cat(sequences), position, context), ends


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_tokens_sampled_in_decode_have_the_trainers_logprobs(family, seed, threads):
    model = model_of(family, seed)
    generator = torch.Generator().manual_seed(seed)
    count = 11
    lengths = torch.randint(1, 14, (count,), generator=generator).tolist()
    prompts = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in lengths]
    goal = [n + int(extra) for n, extra in zip(lengths, torch.randint(1, 40, (count,), generator=generator), strict=True)]
    arrival = torch.randint(0, 15, (count,), generator=generator).tolist()
    temperature = (torch.rand(count, generator=generator) + 0.5).tolist()
    cache = KVCache(LAYERS, count, 64, KV_HEADS, HEAD_DIM)
    tokens = [p.tolist() for p in prompts]
    seen = [0] * count  # tokens in the cache
    logprobs: list[list[float]] = [[] for _ in range(count)]
    most = 0
    with torch.inference_mode():
        for step in itertools.count():
            chunk = {}
            for i in range(count):  # prompts enter in chunks of 5, beside sequences that decode
                left = len(tokens[i]) - seen[i]
                if arrival[i] <= step and len(tokens[i]) < goal[i]:
                    chunk[i] = min(5, left)
            if not chunk and all(len(t) >= g for t, g in zip(tokens, goal, strict=True)):
                break
            if not chunk:
                continue
            most = max(most, len(chunk))
            order = list(chunk)
            ends = [0, *itertools.accumulate(chunk[i] for i in order)]
            context = CachedContext(
                cache=cache, cu_q=torch.tensor(ends, dtype=torch.int32), slot=torch.tensor([(i * 7) % count for i in order]),
                start=torch.tensor([seen[i] for i in order]),
            )  # fmt: skip
            ids = torch.tensor([t for i in order for t in tokens[i][seen[i] : seen[i] + chunk[i]]])
            position = torch.tensor([p for i in order for p in range(seen[i], seen[i] + chunk[i])])
            last = torch.tensor(ends[1:]) - 1
            logits = forward(model, ids, position, context, rows=last)
            heat = torch.tensor([temperature[i] for i in order])
            off, all_of = torch.zeros(len(order), dtype=torch.int64), torch.ones(len(order))
            drawn, logprob = sample(logits, heat, off, all_of, torch.tensor(order), torch.tensor([len(tokens[i]) for i in order]))
            for j, i in enumerate(order):
                seen[i] += chunk[i]
                if seen[i] == len(tokens[i]):
                    tokens[i].append(int(drawn[j]))
                    logprobs[i].append(float(logprob[j]))
    assert most >= 8, "the test wants at least 8 sequences in flight"
    model.train()
    logits, ends = packed(model, [torch.tensor(t) for t in tokens])
    for i, (a, b) in enumerate(itertools.pairwise(ends)):
        rows = torch.arange(a + lengths[i] - 1, b - 1)
        target = torch.tensor(tokens[i][lengths[i] :])
        recomputed = token_logprob(logits[rows], target, temperature[i])[0]
        assert torch.equal(recomputed.detach(), torch.tensor(logprobs[i])), f"sequence {i}"


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_packed_row_does_not_depend_on_its_neighbours(family, threads):
    model = model_of(family, 3)
    generator = torch.Generator().manual_seed(9)
    sequences = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in (1, 64, 3, 17, 100, 16, 31)]
    with torch.no_grad():
        together, ends = packed(model, sequences)
        for i in (0, 3, 4):
            alone, _ = packed(model, [sequences[i]])
            assert torch.equal(alone, together[ends[i] : ends[i + 1]])
        turned, turned_ends = packed(model, sequences[::-1])
        a, b = turned_ends[2], turned_ends[3]
        assert torch.equal(turned[a:b], together[ends[4] : ends[5]])


def test_a_copied_prefix_gives_the_same_bits_as_a_computed_one():
    model = model_of("qwen3", 4)
    ids = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(2))
    cache = KVCache(LAYERS, 3, 40, KV_HEADS, HEAD_DIM)

    def run(slot, first, last):
        cu_q = torch.tensor([0, last - first], dtype=torch.int32)
        context = CachedContext(cache=cache, cu_q=cu_q, slot=torch.tensor([slot]), start=torch.tensor([first]))
        return forward(model, ids[first:last], torch.arange(first, last), context)

    with torch.inference_mode():
        whole = run(0, 0, 40)
        run(1, 0, 25)
        cache.copy_prefix(1, 2, 25)
        assert torch.equal(run(2, 25, 40), whole[25:])


def test_a_sequence_longer_than_the_cache_is_refused():
    cache = KVCache(1, 1, 16, 1, 16)
    with pytest.raises(ValueError, match="17 tokens does not fit into a KV cache of 16"):
        CachedContext(cache=cache, cu_q=torch.tensor([0, 1], dtype=torch.int32), slot=torch.tensor([0]), start=torch.tensor([16]))
