"""Qwen2, Qwen2.5, Qwen3 (dense) and Qwen2-MoE, Qwen3-MoE."""

from miles.models.maps.entry import Config, Entry, same
from miles.models.maps.family import Map
from miles.models.maps.parts import attention, experts, gated_mlp, router

WINDOW = {"use_sliding_window": (False,)}
DENSE = frozenset({"sliding_window", "layer_types"})
MOE = DENSE | {
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
}  # fmt: skip


def qwen2(config: Config, i: int) -> list[Entry]:
    return attention(config, bias=True) + gated_mlp(config, config.number("intermediate_size"))


def qwen3(config: Config, i: int) -> list[Entry]:
    bias = bool(config.get("attention_bias"))
    return attention(config, bias=bias, out_bias=bias, head_norm=True) + gated_mlp(config, config.number("intermediate_size"))


def sparse(config: Config, i: int) -> bool:
    """Whether layer i has experts."""
    return i not in config.get("mlp_only_layers", []) and config.experts > 0 and (i + 1) % config.number("decoder_sparse_step", 1, least=1) == 0


def uniform(config: Config) -> bool:
    """Megatron stacks the layers where all have experts."""
    return all(sparse(config, i) for i in range(config.layers))


def qwen2_moe(config: Config, i: int) -> list[Entry]:
    attended = attention(config, bias=bool(config.get("qkv_bias", True)))
    if not sparse(config, i):
        return attended + gated_mlp(config, config.number("intermediate_size"))
    count, shared = config.experts, config.number("shared_expert_intermediate_size")
    return [
        *attended,
        *router(config, count),
        *experts(config, count, config.number("moe_intermediate_size")),
        *gated_mlp(config, shared, name="mlp.shared_experts", hf="mlp.shared_expert", norm=None),
        same("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", 1, config.hidden),
    ]


def qwen3_moe(config: Config, i: int) -> list[Entry]:
    bias = bool(config.get("attention_bias"))
    attended = attention(config, bias=bias, out_bias=bias, head_norm=True)
    if not sparse(config, i):
        return attended + gated_mlp(config, config.number("intermediate_size"))
    count = config.experts
    return attended + router(config, count) + experts(config, count, config.number("moe_intermediate_size"))


QWEN2 = Map(("qwen2",), qwen2, DENSE, fixed=WINDOW)
QWEN3 = Map(("qwen3",), qwen3, DENSE | {"attention_bias"}, fixed=WINDOW)
QWEN2_MOE = Map(("qwen2_moe",), qwen2_moe, MOE | {"shared_expert_intermediate_size", "qkv_bias"}, uniform, WINDOW)
QWEN3_MOE = Map(("qwen3_moe",), qwen3_moe, MOE | {"attention_bias"}, uniform, WINDOW)
