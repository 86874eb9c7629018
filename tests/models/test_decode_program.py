"""The decode program has the bits of the ordinary forward pass over a cache, for each family, any number of sequences, any threads."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from miles.models.decode import DecodeProgram
from miles.models.forward import CachedContext, forward
from miles.models.load import build_model
from miles.precision.attention import KVCache
from miles.precision.threads import set_threads

ROWS, LENGTH, LAYERS = 40, 64, 2
SIZES = {
    "hidden_size": 96, "intermediate_size": 112, "num_hidden_layers": LAYERS, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 331, "max_position_embeddings": LENGTH, "initializer_range": 0.15,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48, norm_topk_prob=True),
}


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    set_threads(request.param)
    yield request.param
    set_threads(before)


def model_of(family):
    torch.manual_seed(3)
    model = build_model(CONFIGS[family](), batch_invariant=True)
    with torch.no_grad():  # initial biases are 0 and norms 1: give them something to do
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.add_(torch.randn_like(p) * 0.2)
    return model


def cache_of():
    return KVCache(LAYERS, ROWS, LENGTH, SIZES["num_key_value_heads"], SIZES["head_dim"])


@torch.inference_mode()
def ordinary(model, cache, token, position, slot):
    routes = torch.zeros(len(token), LAYERS, 3, dtype=torch.int32)
    context = CachedContext(
        cache=cache, routes=routes, cu_q=torch.arange(len(token) + 1, dtype=torch.int32), slot=torch.from_numpy(slot), start=torch.from_numpy(position),
    )  # fmt: skip
    return forward(model, torch.from_numpy(token), torch.from_numpy(position), context, torch.arange(len(token))), routes


@pytest.mark.parametrize("family", CONFIGS)
def test_program_has_the_bits_of_the_forward_pass(family, threads):
    model, random = model_of(family), np.random.default_rng(7)
    ours, theirs = cache_of(), cache_of()
    program = DecodeProgram(model, ours, ROWS)
    assert DecodeProgram.serves(model, ours)
    length = np.zeros(ROWS, dtype=np.int64)
    for count in (1, 40, 16, 17, 3, 33, 40, 5, 31, 40):
        slot = random.permutation(ROWS)[:count].astype(np.int64)
        token, position = random.integers(0, 331, count), length[slot]
        with torch.inference_mode():
            found, chosen = program.run(token, position, slot)
        wanted, routes = ordinary(model, theirs, token, position, slot)
        assert torch.equal(found, wanted)
        if chosen is not None:
            assert torch.equal(chosen.transpose(0, 1).int(), routes)
        length[slot] += 1
    assert all(torch.equal(a, b) for a, b in zip((*ours.k, *ours.v), (*theirs.k, *theirs.v), strict=True))


def test_program_follows_weights_that_moved():
    model, cache = model_of("qwen3"), cache_of()
    program = DecodeProgram(model, cache, ROWS)
    token, position, slot = np.array([5, 6]), np.array([0, 0]), np.array([1, 2])
    with torch.inference_mode():
        before = program.run(token, position, slot)[0].clone()
    old = [p.data for p in model.parameters()]
    for p in model.parameters():
        p.data = p.data * 1.5
    with torch.inference_mode():
        after = program.run(token, position, slot)[0].clone()
    assert torch.equal(after, ordinary(model, cache_of(), token, position, slot)[0])
    assert not torch.equal(before, after)
    del old


def test_plain_models_are_served_too():
    torch.manual_seed(3)
    model, cache = build_model(CONFIGS["qwen3_moe"](), batch_invariant=False), cache_of()
    token, position, slot = np.array([5, 6]), np.array([0, 0]), np.array([1, 2])
    assert DecodeProgram.serves(model, cache)
    with torch.inference_mode():
        found = DecodeProgram(model, cache, ROWS).run(token, position, slot)[0]
    torch.testing.assert_close(found, ordinary(model, cache_of(), token, position, slot)[0], rtol=1e-5, atol=1e-5)
