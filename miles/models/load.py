"""Loading a model for the trainer or the engine: the same code for both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from miles.config.exits import UserError
from miles.models.attention import NAME
from miles.models.fused import fuse
from miles.models.registry import Family, family_of
from miles.precision.batch_invariant import BLOCK, linear


def load_model(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, batch_invariant: bool = False
) -> PreTrainedModel:
    """A causal model from a Hugging Face folder, in eval mode, to be called through miles.models.forward.forward.

    fp32 on a CPU runs on the compiled kernels, with matrix products in fixed blocks where batch_invariant; anything else runs
    transformers' own modules with the attention "miles". batch_invariant elsewhere, an unknown family, a missing folder: ValueError.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no Hugging Face folder: config.json is missing; give the folder that holds it")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / 'config.json'}: transformers can't read it ({_line(error)}); restore it from the checkpoint's origin") from error
    family = family_of(config)
    _check(device, dtype, batch_invariant)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no safetensors weights; convert them first (other formats are pickles and are not read)")
    try:
        # Tensors that don't fit are reported with the missing ones: transformers would make up values for either.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation=NAME, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, report = loaded
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: its weights can't be loaded ({_line(error)}); restore the folder from its origin") from error
    wrong = sorted(report["missing_keys"]) + sorted(entry[0] for entry in report["mismatched_keys"])
    if wrong:
        raise UserError(f"{folder}: {wrong[0]} is missing or of another shape than config.json says ({len(wrong)} such); restore the folder from its origin")
    return prepare(model, family, device, batch_invariant)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def build_model(
    config: PretrainedConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, batch_invariant: bool = False
) -> PreTrainedModel:
    """A freshly initialised model of the config (transformers' initialisation, torch's generator), otherwise as load_model."""
    family = family_of(config)
    _check(device, dtype, batch_invariant)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=NAME)  # it writes into the config
    return prepare(model, family, device, batch_invariant)


def _check(device: torch.device | str, dtype: torch.dtype, batch_invariant: bool) -> None:
    if batch_invariant and (torch.device(device).type != "cpu" or dtype != torch.float32):
        raise UserError(f"batch-invariant mode exists for float32 on cpu, not for {dtype} on {device}; turn batch_invariant off")


def prepare(model: PreTrainedModel, family: Family, device: torch.device | str, batch_invariant: bool) -> PreTrainedModel:
    """Move a model to its device and put the kernels under it where they serve."""
    movable: Any = model
    movable.to(device)
    parameter = next(model.parameters())
    if parameter.device.type == "cpu" and parameter.dtype == torch.float32:
        fuse(model, family, exact=batch_invariant)
        if batch_invariant:
            verify_products(model)
    elif family.experts:
        _record_routes(model)
    return model.eval()


@torch.no_grad()
def verify_products(model: PreTrainedModel) -> None:
    """Try on this machine, with its threads, that blocked products of this model's shapes are batch-invariant; RuntimeError where not.

    The property was measured for MKL on x86-64; another BLAS or CPU need not have it.
    """
    generator = torch.Generator().manual_seed(0)
    for n, k in sorted({tuple(p.shape[-2:]) for p in model.parameters() if p.dim() >= 2}):
        x = torch.randn(4 * BLOCK, k, generator=generator)
        weight = torch.randn(n, k, generator=generator)
        whole = linear(x, weight)
        for first, last in ((0, 1), (5, 9), (7, 3 * BLOCK + 2), (BLOCK, 2 * BLOCK)):
            if not torch.equal(linear(x[first:last], weight), whole[first:last]):
                raise RuntimeError(f"products of width {k} to {n} are not batch-invariant on this machine; turn batch_invariant off")


def _record_routes(model: PreTrainedModel) -> None:
    """Let transformers' own mixture of experts note its choices in the context (the fused one does so itself)."""
    trunk: Any = model.model

    def remember(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        layer.mlp.gate.__dict__["miles_context"] = kwargs.get("miles_context")

    for number, layer in enumerate(trunk.layers):
        if not hasattr(layer.mlp, "gate"):
            continue

        def note(gate: Any, args: Any, output: Any, number: int = number) -> None:
            context = gate.__dict__.get("miles_context")
            if context is not None:
                context.record(number, output[2])

        layer.register_forward_pre_hook(remember, with_kwargs=True)
        layer.mlp.gate.register_forward_hook(note)
