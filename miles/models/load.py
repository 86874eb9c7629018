"""Loading a model for the trainer or the engine: the same code for both."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from miles.models.attention import NAME
from miles.models.fused import fuse
from miles.models.registry import Family, family_of


def load_model(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, batch_invariant: bool = False
) -> PreTrainedModel:
    """A causal model from a Hugging Face folder, in eval mode, to be called through miles.models.forward.forward.

    fp32 on a CPU runs on the compiled kernels, with matrix products in fixed blocks where batch_invariant; anything else runs
    transformers' own modules with the attention "miles". batch_invariant elsewhere, an unknown family, a missing folder: ValueError.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no Hugging Face folder: config.json is missing; give the folder that holds it")
    config = AutoConfig.from_pretrained(folder)
    family = family_of(config)
    _check(device, dtype, batch_invariant)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation=NAME)
    return prepare(model.to(device), family, batch_invariant)


def build_model(
    config: PretrainedConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, batch_invariant: bool = False
) -> PreTrainedModel:
    """A freshly initialised model of the config (transformers' initialisation, torch's generator), otherwise as load_model."""
    family = family_of(config)
    _check(device, dtype, batch_invariant)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
    return prepare(model.to(device), family, batch_invariant)


def _check(device: torch.device | str, dtype: torch.dtype, batch_invariant: bool) -> None:
    if batch_invariant and (torch.device(device).type != "cpu" or dtype != torch.float32):
        raise ValueError(f"batch-invariant mode exists for float32 on cpu, not for {dtype} on {device}; turn batch_invariant off")


def prepare(model: PreTrainedModel, family: Family, batch_invariant: bool) -> PreTrainedModel:
    """Put the kernels under a model where they serve."""
    parameter = next(model.parameters())
    if parameter.device.type == "cpu" and parameter.dtype == torch.float32:
        fuse(model, family, exact=batch_invariant)
    return model.eval()
