"""MiniMax-M2, M2.1: QK-norm over all heads at once, experts w1 (gate), w3 (up), w2 (down)."""

from miles.config.exits import UserError
from miles.models.maps.entry import Config, Entry
from miles.models.maps.family import Map
from miles.models.maps.parts import attention, experts, router

FIELDS = frozenset({
    "num_local_experts", "num_experts_per_tok", "rotary_dim", "partial_rotary_factor", "use_routing_bias", "layer_types", "sliding_window", "attn_type_list",
    "use_mtp", "shared_moe_mode", "num_mtp_modules", "mtp_transformer_layers", "initializer_factor", "layernorm_full_attention_beta", "layernorm_linear_attention_beta",
    "layernorm_mlp_beta", "mlp_intermediate_size", "norm_topk_prob", "num_experts",
})  # fmt: skip
FIXED = {
    "use_qk_norm": (True,), "qk_norm_type": ("per_layer",), "scoring_func": ("sigmoid",), "shared_intermediate_size": (0,),
    "attention_bias": (False,),
}  # fmt: skip


def layer(config: Config, i: int) -> list[Entry]:
    count, names = config.experts, ("w1", "w3", "w2")
    return [
        *attention(config, whole_norm=True),
        *router(config, count, "block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias"),
        *experts(config, count, config.number("intermediate_size"), "block_sparse_moe.experts", names),
    ]


def check(config: Config) -> None:
    """Lightning attention of earlier MiniMax models is another computation."""
    if any(kind != 1 for kind in config.get("attn_type_list", [])):
        raise UserError(f"{config.where}: attn_type_list asks for lightning attention, which is not supported; supported: softmax attention (1) in all layers")


MINIMAX_M2 = Map(("minimax_m2",), layer, FIELDS, fixed=FIXED, check=check)
