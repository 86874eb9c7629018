"""Gemma 2, Gemma 3 and Gemma 3N (text). Norms stay zero-centred, as Megatron's layernorm_zero_centered_gamma wants them.

Gemma 3N's own parts (alternating updates, low-rank residual, per-layer inputs) have no module in megatron-core; their names are kept.
"""

from miles.config.exits import UserError
from miles.models.maps.entry import Config, Entry, same
from miles.models.maps.family import Map
from miles.models.maps.parts import attention, ends, gated_mlp

FIELDS = frozenset({
    "attention_bias", "sliding_window", "layer_types", "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping",
    "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq",
})  # fmt: skip
OWN = frozenset({
    "activation_sparsity_pattern", "altup_active_idx", "altup_coef_clip", "altup_correct_scale", "altup_num_inputs", "hidden_size_per_layer_input",
    "laurel_rank", "num_kv_shared_layers", "vocab_size_per_layer_input",
})  # fmt: skip


def layer(config: Config, i: int, *, head_norm: bool, width: int) -> list[Entry]:
    """Attention and MLP with a norm before and one after each."""
    bias, hidden = bool(config.get("attention_bias")), config.hidden
    return [
        *attention(config, bias=bias, out_bias=bias, head_norm=head_norm),
        *gated_mlp(config, width, norm="pre_feedforward_layernorm"),
        same("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm.weight", hidden),
        same("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm.weight", hidden),
    ]


def gemma2(config: Config, i: int) -> list[Entry]:
    return layer(config, i, head_norm=False, width=config.number("intermediate_size"))


def gemma3(config: Config, i: int) -> list[Entry]:
    return layer(config, i, head_norm=True, width=config.number("intermediate_size"))


def _widths(config: Config) -> list[int]:
    found = config.get("intermediate_size")
    return list(found) if isinstance(found, list) else [config.number("intermediate_size")] * config.layers


def gemma3n(config: Config, i: int) -> list[Entry]:
    hidden, inputs, rank, extra = config.hidden, config.number("altup_num_inputs"), config.number("laurel_rank"), config.number("hidden_size_per_layer_input")
    own = {
        "altup.correct_output_scale": (hidden,), "altup.correction_coefs.weight": (inputs, inputs), "altup.modality_router.weight": (inputs, hidden),
        "altup.prediction_coefs.weight": (inputs * inputs, inputs), "altup.router_norm.weight": (hidden,), "laurel.linear_left.weight": (rank, hidden),
        "laurel.linear_right.weight": (hidden, rank), "laurel.post_laurel_norm.weight": (hidden,), "per_layer_input_gate.weight": (extra, hidden),
        "per_layer_projection.weight": (hidden, extra), "post_per_layer_input_norm.weight": (hidden,),
    }  # fmt: skip
    return layer(config, i, head_norm=True, width=_widths(config)[i]) + [same(name, name, *shape) for name, shape in own.items()]


def gemma3n_top(config: Config) -> list[Entry]:
    hidden, extra = config.hidden, config.number("hidden_size_per_layer_input")
    own = {
        "embed_tokens_per_layer.weight": (config.number("vocab_size_per_layer_input"), config.layers * extra),
        "per_layer_model_projection.weight": (config.layers * extra, hidden), "per_layer_projection_norm.weight": (extra,),
    }  # fmt: skip
    for kind in ("altup_projections", "altup_unembed_projections"):
        own |= {f"{kind}.{i}.weight": (hidden, hidden) for i in range(config.number("altup_num_inputs") - 1)}
    return ends(config) + [same(f"decoder.{name}", f"model.{name}", *shape) for name, shape in own.items()]


def check(config: Config) -> None:
    """One width of the MLP for each layer."""
    if len(_widths(config)) != config.layers:
        raise UserError(f"{config.where}: intermediate_size lists {len(_widths(config))} widths for {config.layers} layers; restore config.json from its origin")


ACTIVATIONS = ("gelu_pytorch_tanh",)
GEMMA2 = Map(("gemma2",), gemma2, FIELDS, activations=ACTIVATIONS, tied=True)
GEMMA3 = Map(("gemma3_text",), gemma3, FIELDS, activations=ACTIVATIONS, tied=True)
GEMMA3N = Map(("gemma3n_text",), gemma3n, FIELDS | OWN, lambda config: False, activations=ACTIVATIONS, tied=True, top=gemma3n_top, check=check)
