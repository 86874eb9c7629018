"""DeepSeek-V3 and R1, V3.2 (with its indexer), Kimi-K2, GLM-4.7-Flash: latent attention, experts with a balancing bias, MTP."""

from miles.models.maps.entry import Config, Entry, same
from miles.models.maps.family import Map
from miles.models.maps.parts import experts, gated_mlp, latent_attention, router

FIELDS = frozenset({
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts",
    "num_experts_per_tok", "num_local_experts", "moe_intermediate_size", "first_k_dense_replace", "routed_scaling_factor", "n_group", "topk_group",
    "norm_topk_prob", "rope_interleave", "mlp_layer_types", "num_experts", "layer_types", "partial_rotary_factor",
})  # fmt: skip
FIXED = {"attention_bias": (False,), "mlp_bias": (False,), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)}
INDEXER = frozenset({"index_n_heads", "index_head_dim", "index_topk"})


def sparse(config: Config, i: int) -> bool:
    """Whether layer i has experts; MTP layers, beyond the last, do."""
    kinds = config.get("mlp_layer_types")
    if kinds is not None and i < len(kinds):
        return bool(kinds[i] == "sparse")
    return i >= config.number("first_k_dense_replace", 3 if config.get("model_type") == "deepseek_v3" else 0)


def feed_forward(config: Config, i: int) -> list[Entry]:
    """The MLP of a dense layer, or router, experts and the shared expert."""
    if not sparse(config, i):
        return gated_mlp(config, config.number("intermediate_size"))
    count, width = config.experts, config.number("moe_intermediate_size")
    shared = config.number("n_shared_experts", 0) * width
    return [
        *router(config, count, bias="mlp.gate.e_score_correction_bias"),
        *experts(config, count, width),
        *(gated_mlp(config, shared, name="mlp.shared_experts", hf="mlp.shared_experts", norm=None) if shared else []),
    ]


def deepseek_v3(config: Config, i: int) -> list[Entry]:
    return latent_attention(config) + feed_forward(config, i)


def deepseek_v32(config: Config, i: int) -> list[Entry]:
    heads, width, to, hf = config.number("index_n_heads"), config.number("index_head_dim"), "self_attention.core_attention.indexer.", "self_attn.indexer."
    return [
        *latent_attention(config, fused_norms=False),
        same(f"{to}linear_wq_b.weight", f"{hf}wq_b.weight", heads * width, config.number("q_lora_rank")),
        same(f"{to}linear_wk.weight", f"{hf}wk.weight", width, config.hidden),
        same(f"{to}k_norm.weight", f"{hf}k_norm.weight", width),
        same(f"{to}k_norm.bias", f"{hf}k_norm.bias", width),
        same(f"{to}linear_weights_proj.weight", f"{hf}weights_proj.weight", heads, config.hidden),
        *feed_forward(config, i),
    ]


def _per_layer(config: Config) -> bool:
    return False


DEEPSEEK_V3 = Map(("deepseek_v3", "kimi_k2"), deepseek_v3, FIELDS, _per_layer, FIXED, mtp=True)
DEEPSEEK_V32 = Map(("deepseek_v32",), deepseek_v32, FIELDS | INDEXER, _per_layer, FIXED, mtp=True)
GLM4_MOE_LITE = Map(("glm4_moe_lite",), deepseek_v3, FIELDS, _per_layer, FIXED, mtp=True)
