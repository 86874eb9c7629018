"""Our forward pass and gradients against transformers' own eager modules in float64."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from miles.models.forward import CachedContext, PackedContext, forward
from miles.models.load import build_model, load_model
from miles.precision.attention import KVCache

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 128, "initializer_range": 0.05,
}  # fmt: skip
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, scaled rotary, biases": lambda: LlamaConfig(**SIZES, rope_parameters=ROPE, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True),
    "qwen3_moe, weights as they are, one dense layer": lambda: Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=False, mlp_only_layers=[0]
    ),
}
LENGTHS = (7, 1, 30, 16)


def reference_of(model, config):
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").double()
    reference.load_state_dict(model.state_dict())
    return reference


def shake(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.add_(torch.randn_like(p) * 0.2)


def batch(vocabulary):
    sequences = [torch.randint(0, vocabulary, (n,)) for n in LENGTHS]
    ends = [0, *itertools.accumulate(LENGTHS)]
    position = torch.cat([torch.arange(n) for n in LENGTHS])
    return sequences, ends, torch.cat(sequences), position, torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("exact", [True, False], ids=["invariant", "plain"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(name, exact):
    torch.manual_seed(5)
    config = CONFIGS[name]()
    model = build_model(config, batch_invariant=exact)
    shake(model)
    reference = reference_of(model, config)
    sequences, _, ids, position, cu = batch(config.vocab_size)
    logits = forward(model.train(), ids, position, PackedContext(cu_seqlens=cu))
    expected = torch.cat([reference(s[None]).logits[0] for s in sequences])
    assert (logits - expected).abs().max() < 1e-5
    weight = torch.randn_like(expected)
    (logits * weight.float()).sum().backward()
    (expected * weight).sum().backward()
    wanted = dict(reference.named_parameters())
    assert wanted.keys() == dict(model.named_parameters()).keys()
    for parameter, p in model.named_parameters():
        g = wanted[parameter].grad
        assert (p.grad - g).abs().max() < 2e-5 * g.abs().max().clamp_min(1e-3), parameter


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_transformers_own_modules_with_our_attention(name):
    """What CUDA and bfloat16 use, here in float64: packed, and prefill and decode over a cache; the routes too."""
    torch.manual_seed(6)
    config = CONFIGS[name]()
    model = build_model(config, dtype=torch.bfloat16).double()
    reference = reference_of(model, config)
    model.config._experts_implementation = "eager"
    sequences, ends, ids, position, cu = batch(config.vocab_size)
    expected = torch.cat([reference(s[None]).logits[0] for s in sequences])
    routes = torch.full((len(ids), 2, 2), -1, dtype=torch.int32) if name == "qwen3_moe" else None
    with torch.no_grad():
        logits = forward(model, ids, position, PackedContext(cu_seqlens=cu, routes=routes))
        assert (logits - expected).abs().max() < 1e-5
        cache = KVCache(2, 4, 40, 2, 16, dtype=torch.float64)
        slot = torch.tensor([2, 0, 3, 1])
        first = [n - 1 for n in LENGTHS]
        starts = torch.zeros(4, dtype=torch.int64)
        context = CachedContext(
            cache=cache, cu_q=torch.tensor([0, *itertools.accumulate(first)], dtype=torch.int32), slot=slot, start=starts
        )  # fmt: skip
        early = torch.cat([s[:-1] for s in sequences])
        forward(model, early, torch.cat([torch.arange(n) for n in first]), context)
        step = CachedContext(cache=cache, cu_q=torch.arange(5, dtype=torch.int32), slot=slot, start=torch.tensor(first))
        last = forward(model, torch.stack([s[-1] for s in sequences]), torch.tensor(first), step)
    assert (last - expected[torch.tensor(ends[1:]) - 1]).abs().max() < 1e-5
    if routes is not None:
        fused = build_model(config)
        fused.load_state_dict(model.state_dict())
        ours = torch.full_like(routes, -1)
        with torch.no_grad():
            forward(fused, ids, position, PackedContext(cu_seqlens=cu, routes=ours))
        assert routes.min() >= 0
        assert torch.equal(routes, ours)


def test_bfloat16_runs_plain():
    torch.manual_seed(7)
    config = CONFIGS["qwen3"]()
    model = build_model(config, dtype=torch.bfloat16)
    reference = reference_of(model, config)
    sequences, _, ids, position, cu = batch(config.vocab_size)
    with torch.no_grad():
        logits = forward(model, ids, position, PackedContext(cu_seqlens=cu))
        expected = torch.cat([reference(s[None]).logits[0] for s in sequences])
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.05


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_gradient_checkpointing_changes_no_bit(name):
    torch.manual_seed(8)
    model = build_model(CONFIGS[name](), batch_invariant=True).train()
    _, _, ids, position, cu = batch(131)

    def gradients():
        model.zero_grad()
        forward(model, ids, position, PackedContext(cu_seqlens=cu)).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.equal(a, b)


def test_rows_choose_logits():
    torch.manual_seed(9)
    model = build_model(CONFIGS["llama"](), batch_invariant=True)
    _, _, ids, position, cu = batch(131)
    rows = torch.tensor([3, 53, 0, 3])
    with torch.no_grad():
        whole = forward(model, ids, position, PackedContext(cu_seqlens=cu))
        assert torch.equal(forward(model, ids, position, PackedContext(cu_seqlens=cu), rows=rows), whole[rows])
    assert whole.shape == (54, 131)


def test_a_folder_of_transformers_loads_and_saves_back(tmp_path):
    torch.manual_seed(10)
    config = CONFIGS["qwen3_moe"]()
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    theirs.save_pretrained(tmp_path / "a")
    ours = load_model(tmp_path / "a", batch_invariant=True)
    assert not ours.training
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ids = torch.randint(0, 131, (20,))
    with torch.no_grad():
        expected = theirs.eval()(ids[None]).logits[0]
        got = forward(ours, ids, torch.arange(20), PackedContext(cu_seqlens=torch.tensor([0, 20], dtype=torch.int32)))
    assert (got - expected).abs().max() < 1e-5
    ours.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert type(again).__name__ == "Qwen3MoeForCausalLM"
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
