"""Layer specs: Transformer Engine's where there is a GPU; without one, megatron-core's own modules under Transformer Engine's names."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_dsa_module_spec_for_backend,
    get_transformer_layer_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec, get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from miles.training.megatron.local import Attention, Norm, WholeLinear

# Transformer Engine computes a norm in the linear after it, and names it so.
INPUT = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
MLP = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
LATENT = {f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_" for x in ("q", "kv")}


class Local(LocalSpecProvider):
    """megatron-core's local modules, with our norm, attention and unsplit linear."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        """Our norm; config.normalization decides which."""
        return Norm

    def core_attention(self) -> Any:
        """Our attention."""
        return Attention

    def linear(self) -> Any:
        """A linear that is the same on every rank."""
        return WholeLinear


def layers(config: Any, engine: bool, l2_norm: list[bool]) -> list[ModuleSpec]:
    """A spec for every decoder layer. engine: with Transformer Engine. l2_norm: layers whose queries and keys have unit length (Llama 4)."""
    pattern = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else [int(bool(config.num_moe_experts))] * config.num_layers
    if engine and config.experimental_attention_variant:
        return get_transformer_layer_with_experimental_attention_variant_spec(config)
    make = _engine if engine else _local
    return [make(config, bool(sparse), unit) for sparse, unit in zip(pattern, l2_norm, strict=True)]


def mtp(config: Any, layer: ModuleSpec, engine: bool) -> Any:
    """The block of MTP layers, each around a layer like `layer`."""
    backend = _backend(engine)
    wrapped = MultiTokenPredictionLayerSubmodules(
        enorm=backend.layer_norm(rms_norm=True), hnorm=backend.layer_norm(rms_norm=True), eh_proj=backend.column_parallel_linear(), mtp_model_layer=layer,
        layer_norm=backend.layer_norm(rms_norm=True),
    )  # fmt: skip
    return MultiTokenPredictionBlockSubmodules(layer_specs=[ModuleSpec(module=MultiTokenPredictionLayer, submodules=wrapped)] * config.mtp_num_layers)


def final_norm(engine: bool) -> Any:
    """The norm after the last layer."""
    return _backend(engine).layer_norm(rms_norm=True)


def _backend(engine: bool) -> Any:
    if not engine:
        return Local()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _engine(config: Any, sparse: bool, unit: bool) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if sparse else None, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention, qk_l2_norm=unit,
    )  # fmt: skip


def _local(config: Any, sparse: bool, unit: bool) -> ModuleSpec:
    backend = Local()
    attention, names = _local_attention(config, unit)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm, self_attention=attention, self_attn_bda=get_bias_dropout_add, pre_mlp_layernorm=Norm,
            mlp=get_mlp_module_spec_for_backend(backend=backend, num_experts=config.num_moe_experts if sparse else None, moe_grouped_gemm=False),
            mlp_bda=get_bias_dropout_add, sharded_state_dict_keys_map=names if sparse else names | MLP,
        ),
    )  # fmt: skip


def _local_attention(config: Any, unit: bool) -> tuple[ModuleSpec, dict[str, str]]:
    """The attention's spec, and the names of checkpoints that differ from the modules'."""
    backend = Local()
    column, row, params = backend.column_parallel_linear(), backend.row_parallel_linear(), {"attn_mask_type": AttnMaskType.causal}
    if config.experimental_attention_variant == "dsa":
        spec = get_dsa_module_spec_for_backend(config, backend)
        spec.submodules.linear_q_down_proj = spec.submodules.linear_kv_down_proj = column
        return spec, {}
    if config.multi_latent_attention:
        latent = MLASelfAttentionSubmodules(
            linear_q_proj=column, linear_q_down_proj=column, linear_q_up_proj=column, linear_kv_down_proj=column, linear_kv_up_proj=column,
            core_attention=Attention, linear_proj=row, q_layernorm=Norm, kv_layernorm=Norm,
        )  # fmt: skip
        return ModuleSpec(module=MLASelfAttention, params=params, submodules=latent), LATENT
    heads = L2Norm if unit else Norm if config.qk_layernorm else IdentityOp
    grouped = SelfAttentionSubmodules(linear_qkv=column, core_attention=Attention, linear_proj=row, q_layernorm=heads, k_layernorm=heads)
    return ModuleSpec(module=SelfAttention, params=params, submodules=grouped), INPUT
