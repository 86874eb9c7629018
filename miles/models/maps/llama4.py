"""Llama 4 (text): experts in two transposed tensors, a shared expert; interleaved rotary pairs and chunked attention change no weight."""

from miles.models.maps.entry import Config, Entry
from miles.models.maps.family import Map
from miles.models.maps.parts import attention, experts_in_one, gated_mlp, router

FIELDS = frozenset({
    "intermediate_size_mlp", "num_local_experts", "num_experts_per_tok", "interleave_moe_layer_step", "moe_layers", "use_qk_norm", "no_rope_layers",
    "no_rope_layer_interval", "attention_chunk_size", "layer_types", "attn_temperature_tuning", "floor_scale", "attn_scale", "for_llm_compressor",
})  # fmt: skip


def sparse(config: Config, i: int) -> bool:
    """Whether layer i has experts."""
    listed = config.get("moe_layers")
    return i in listed if listed is not None else (i + 1) % config.number("interleave_moe_layer_step", 1, least=1) == 0


def layer(config: Config, i: int) -> list[Entry]:
    bias = bool(config.get("attention_bias"))
    attended = attention(config, bias=bias, out_bias=bias)
    if not sparse(config, i):
        return attended + gated_mlp(config, config.number("intermediate_size_mlp"), hf="feed_forward")
    count, width = config.experts, config.number("intermediate_size")
    return [
        *attended,
        *router(config, count, "feed_forward.router.weight"),
        *experts_in_one(config, count, width, "feed_forward.experts"),
        *gated_mlp(config, width, name="mlp.shared_experts", hf="feed_forward.shared_expert", norm=None),
    ]


def uniform(config: Config) -> bool:
    """Megatron stacks the layers where all have experts."""
    return all(sparse(config, i) for i in range(config.layers))


LLAMA4 = Map(("llama4_text",), layer, FIELDS | {"attention_bias"}, uniform)
