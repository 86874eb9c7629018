"""A megatron-core model of a Hugging Face config, this rank's part of it."""

from __future__ import annotations

from typing import Any

import torch

from miles.config.exits import UserError
from miles.config.schema import Parallel
from miles.models.maps.find import Known
from miles.models.maps.pieces import padded_vocabulary
from miles.training.megatron import cpu
from miles.training.megatron.layout import check_layout, stages
from miles.training.megatron.options import LATENT, longest, rotated_layers, transformer
from miles.training.megatron.rope import Rope, rope


def build(
    known: Known, parallel: Parallel, *, dtype: torch.dtype = torch.float32, mtp_layers: int = 0, sequence_length: int = 4096,
    make_vocab_size_divisible_by: int = 1,
) -> Any:  # fmt: skip
    """The GPTModel of this rank under start_groups' groups, in `dtype`, its weights random; on the GPU where there is one.

    mtp_layers: MTP layers after the last. sequence_length: the longest that it will see [tokens]. Embedding and output layer have
    padded_vocabulary rows. UserError for a model that megatron-core would compute otherwise than its family, and for a layout that
    can't split it.
    """
    cpu.prepare()
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from miles.training.megatron import spec

    bound = longest(known)
    if bound is not None and sequence_length > bound:
        raise UserError(f"{known.config.where}: megatron-core 0.19.2 computes this model for sequences up to {bound} tokens, not {sequence_length}; shorten them, or train it with train.backend=fsdp")
    if mtp_layers and not known.family.mtp:
        raise UserError(f"{known.config.where}: model_type {known.config.get('model_type')!r} has no MTP layers; set model.mtp_num_layers=null")
    engine = torch.cuda.is_available()
    rotary = rope(known.config, known.config.get("model_type") in LATENT)
    config = transformer_config(known, parallel, rotary, dtype, mtp_layers, engine)
    specs = spec.layers(config, engine, _unit_layers(known))
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = GPTModel(
        config, TransformerBlockSubmodules(layer_specs=_mine(config, specs), layer_norm=spec.final_norm(engine)),
        vocab_size=padded_vocabulary(known.config.number("vocab_size"), make_vocab_size_divisible_by, parallel.tensor), max_sequence_length=sequence_length,
        pre_process=first, post_process=last, share_embeddings_and_output_weights=known.tied, parallel_output=True,
        mtp_block_spec=spec.mtp(config, specs[-1], engine) if mtp_layers and last else None, **rotary.model,
    )  # fmt: skip
    if rotary.llama3:
        table = model.rotary_pos_emb
        table.inv_freq = table._apply_scaling(table.inv_freq, **rotary.llama3)
    return model


def transformer_config(known: Known, parallel: Parallel, rotary: Rope, dtype: torch.dtype, mtp_layers: int, engine: bool) -> Any:
    """megatron-core's TransformerConfig. engine: with Transformer Engine and fused kernels, on a GPU."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    check_layout(known, parallel)
    kind = MLATransformerConfig if known.config.get("model_type") in LATENT else TransformerConfig
    config = kind(
        **transformer(known, mtp_layers), **rotary.config, params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16, fp16=False,
        tensor_model_parallel_size=parallel.tensor, pipeline_model_parallel_size=parallel.pipeline, context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert, expert_tensor_parallel_size=parallel.inside_expert, sequence_parallel=parallel.tensor > 1,
        pipeline_model_parallel_layout=stages(known.config.layers, mtp_layers, parallel.pipeline), variable_seq_lengths=parallel.pipeline > 1,
        use_cpu_initialization=not engine, masked_softmax_fusion=False, bias_activation_fusion=engine, bias_dropout_fusion=engine, apply_rope_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=engine, moe_grouped_gemm=engine and bool(known.config.experts),
        transformer_impl="transformer_engine" if engine else "local",
    )  # fmt: skip
    for name, value in rotary.later.items():
        setattr(config, name, value)
    return config


def _unit_layers(known: Known) -> list[bool]:
    """Layers whose queries and keys are brought to unit length: those of Llama 4 that rotate them."""
    config = known.config
    if config.get("model_type") != "llama4_text" or not config.get("use_qk_norm", True):
        return [False] * config.layers
    return rotated_layers(config)


def _mine(config: Any, specs: list[Any]) -> list[Any]:
    """The layers of this pipeline stage."""
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    rank = parallel_state.get_pipeline_model_parallel_rank()
    if config.pipeline_model_parallel_layout is not None:
        return [specs[i] for i in config.pipeline_model_parallel_layout.get_layer_id_list(layer_type=LayerType.decoder, pp_rank=rank)]
    offset = get_transformer_layer_offset(config, pp_rank=rank)
    return specs[offset : offset + get_num_layers_to_build(config, pp_rank=rank)]
