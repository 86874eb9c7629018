"""megatron-core's models of the families: transformers' logits from converted checkpoints, split over ranks; refusals by name.

Here a few families in two layouts; all of them in all layouts: tests/faults/test_megatron_layouts.py.
"""

import importlib.util

import megatron_cases
import pytest
import run_ranks

from miles.config.exits import UserError
from miles.config.schema import Parallel
from miles.models.maps.find import MAPS, known
from miles.training.megatron.layout import check_layout, stages
from miles.training.megatron.options import ABSENT, KNOWN, longest, transformer
from miles.training.megatron.rope import rope

CLOSE = 1e-5
COMMON = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DENSE = COMMON | {"model_type": "qwen3"}
GEMMA = COMMON | {"hidden_act": "gelu_pytorch_tanh"}
QWEN = COMMON | EXPERTS | {"model_type": "qwen3_moe"}
LATENT = COMMON | EXPERTS | {
    "model_type": "deepseek_v3", "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4,
    "n_group": 2, "topk_group": 1,
}  # fmt: skip
LLAMA4 = COMMON | {"model_type": "llama4_text", "intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1}
JOBS = [
    {"layout": {"tensor": 2, "expert": 2, "expert_tensor": 1}, "cases": ["deepseek_v3", "qwen3_moe"]}, {"layout": {"pipeline": 2}, "cases": ["qwen2", "deepseek_v3"]},
    {"layout": {"tensor": 2}, "cases": ["llama", "qwen3"], "not": {"llama": "qwen3", "qwen3": "llama"}},
]  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed: make test installs it")
def test_split_models_compute_transformers_logits(tmp_path):
    cases = {name: megatron_cases.make(tmp_path / name, name) for name in {name for job in JOBS for name in job["cases"]}}
    results = run_ranks.run(2, "megatron_programs.compare", tmp_path / "ranks", jobs=JOBS, cases=cases)
    seen = 0
    for job, found in ((job, result[i]) for result in results for i, job in enumerate(JOBS)):
        for name in job["cases"]:
            assert all(value < CLOSE for value in found[name].values()), (job["layout"], name, found[name])
            seen += len(found[name])
    assert seen == 2 * (2 + 1 + 2) + (2 + 1), "logits, and of DeepSeek's MTP head, on both tensor-parallel ranks, or on the last stage"
    for result in results:
        assert "q_layernorm.weight has no place in the model" in result[2]["llama refused"]
        assert "q_layernorm.weight is missing" in result[2]["qwen3 refused"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (GEMMA | {"model_type": "gemma2"}, "soft caps"),
        (GEMMA | {"model_type": "gemma3_text"}, "norms after attention"),
        (GEMMA | {"model_type": "gemma3n_text"}, "alternating updates"),
        (COMMON | {"model_type": "minimax_m2", "num_local_experts": 4}, "QK-norm over all heads"),
        (DENSE | {"attention_bias": True}, "attention_bias"),
        (LATENT | {"num_experts_per_tok": 1}, "num_experts_per_tok"),
        (LATENT | {"norm_topk_prob": False}, "norm_topk_prob"),
        (LATENT | {"num_experts_per_tok": 4}, "topk_group"),
        (LLAMA4 | {"num_experts_per_tok": 2}, "num_experts_per_tok"),
    ],
)  # fmt: skip
def test_what_megatron_core_computes_otherwise_is_refused(fields, said):
    with pytest.raises(UserError, match=said) as caught:
        transformer(known(fields, "config.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "scaling", "said"),
    [
        (DENSE, {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 32}, "partial_rotary_factor"),
        (DENSE, {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0, "original_max_position_embeddings": 32}, "attention_factor"),
        (LATENT, {"rope_type": "linear", "factor": 4.0}, "linear"),
        (LATENT, {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "original_max_position_embeddings": 32}, "mscale_all_dim"),
        (LATENT | {"rope_interleave": False}, {"rope_type": "default"}, "rope_interleave"),
    ],
)
def test_rotary_embeddings_that_differ_are_refused(fields, scaling, said):
    config = known(fields | {"rope_parameters": scaling | {"rope_theta": 1e4}}, "config.json").config
    with pytest.raises(UserError, match=said):
        rope(config, latent="kv_lora_rank" in fields)


def test_every_family_is_built_or_refused():
    assert {*KNOWN} | {*ABSENT} == {*MAPS}
    assert {*KNOWN} & {*ABSENT} == set()
    assert {family for family, _, _ in megatron_cases.CASES.values()} == {*KNOWN} - {"kimi_k2"}, "kimi_k2 is deepseek_v3 under another name"


def test_llama4_is_computed_up_to_its_first_chunk():
    assert longest(known(LLAMA4 | {"attention_chunk_size": 8192, "floor_scale": 8192}, "config.json")) == 8191
    assert longest(known(LLAMA4 | {"attention_chunk_size": 4096, "attn_temperature_tuning": False}, "config.json")) == 4096
    assert longest(known(QWEN, "config.json")) is None


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Parallel(tensor=8), "attention heads"), (Parallel(tensor=4), "key-value heads"), (Parallel(expert=3), "4 experts"), (Parallel(pipeline=3), "2 layers"),
        (Parallel(context=2), "context"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_split_the_model_is_refused(layout, said):
    with pytest.raises(UserError, match=said):
        check_layout(known(QWEN, "config.json"), layout)


def test_layers_that_do_not_divide():
    assert stages(4, 1, 2) is None
    assert stages(3, 1, 2) == [["embedding", "decoder"], ["decoder", "decoder", "mtp", "loss"]]
    held = stages(61, 1, 16)
    assert len(held) == 16
    assert sum(stage.count("decoder") for stage in held) == 61
    assert {stage.count("decoder") for stage in held} == {3, 4}
