"""What a family's map states, and what is refused before any tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from miles.config.exits import UserError
from miles.models.maps.entry import Config, Entry
from miles.models.maps.parts import ends

# Fields that every family may have: dimensions that the parts read, and what changes no forward pass.
ATTENTION = {"num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "intermediate_size"}
NUMERICS = {"hidden_act", "hidden_activation", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "tie_word_embeddings"}
WITHOUT_EFFECT = {
    "architectures", "model_type", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range", "attention_dropout",
    "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    "max_window_layers", "num_nextn_predict_layers", "ep_size", "aux_loss_alpha", "seq_aux", "_name_or_path", "name_or_path", "is_decoder",
    "quantization_config", "compression_config", "unsloth_version", "is_encoder_decoder", "attention_probs_dropout_prob",
    "hidden_dropout_prob", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
    "cache_implementation", "_attn_implementation_autoset",
}  # fmt: skip
LISTS = ("layer_types", "mlp_layer_types", "mlp_only_layers", "moe_layers", "attn_type_list", "no_rope_layers")
OBJECTS = ("quantization_config", "compression_config")
ROPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Map:
    """One family: its model_types, the config fields that it understands beyond the common ones, and its layers.

    layer(config, i): the tensors of layer i, names without the layer's. sparse(config, i): whether layer i has experts.
    uniform(config): whether Megatron stacks all layers in one tensor. fixed: fields that have one understood value.
    mtp: whether the layers after the last are multi-token prediction in DeepSeek's manner.
    """

    model_types: tuple[str, ...]
    layer: Callable[[Config, int], list[Entry]]
    fields: frozenset[str] = frozenset()
    uniform: Callable[[Config], bool] = lambda config: True
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    activations: tuple[str, ...] = ("silu",)
    tied: bool = False  # transformers' default of tie_word_embeddings
    mtp: bool = False
    top: Callable[[Config], list[Entry]] = ends
    check: Callable[[Config], None] = lambda config: None


def check(family: Map, config: Config) -> None:
    """UserError naming the first config field that the family's map does not understand and that would change the computation."""
    for name, wanted, word in (*((name, list, "a list") for name in LISTS), *((name, dict, "an object") for name in OBJECTS)):
        if config.get(name) is not None and not isinstance(config.get(name), wanted):
            raise UserError(f"{config.where}: {name} is {config.get(name)!r}, {word} is needed; restore config.json from the checkpoint's origin")
    known = ATTENTION | NUMERICS | WITHOUT_EFFECT | family.fields | set(family.fixed)
    for name, value in config.fields.items():
        if name not in known and value not in (None, False, 0, [], {}):
            raise UserError(
                f"{config.where}: {name} = {value!r} is not understood for model_type {config.get('model_type')!r}, so the converted model could "
                f"compute something else; remove the field if it has no effect"
            )
        if name in family.fixed and value is not None and value not in family.fixed[name]:
            raise UserError(f"{config.where}: {name} = {value!r} is not supported for model_type {config.get('model_type')!r}; supported: {_words(family.fixed[name])}")
    activation = config.get("hidden_act") or config.get("hidden_activation") or family.activations[0]
    if activation not in family.activations:
        raise UserError(f"{config.where}: hidden_act = {activation!r} is not supported; supported: {', '.join(family.activations)}")
    for rope in [config.rope, *(value for value in config.rope.values() if isinstance(value, dict))]:
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ROPES:
            raise UserError(f"{config.where}: rope_type {kind!r} is not supported; supported: {', '.join(ROPES)}")
    if not config.groups or config.heads % config.groups:
        raise UserError(f"{config.where}: {config.heads} attention heads can't share {config.groups} key-value heads; restore config.json from the checkpoint's origin")
    family.check(config)


def _words(values: tuple[object, ...]) -> str:
    return ", ".join(repr(value) for value in values)
