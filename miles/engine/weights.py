"""Weights of a running engine: checked before anything changes, replaced in place, fingerprinted."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from miles.config.exits import UserError
from miles.engine.runner import Runner
from miles.models.hf_folder import load_state, named_tensors, weight_checksum
from miles.models.hf_names import to_hf_names

Entry = tuple[str, torch.Tensor]


class Weights:
    """`path` and `version` of what is served; `missing` names tensors that were released and not loaded since."""

    def __init__(self, runner: Runner, path: str, version: str):
        self._runner = runner
        self.path = path
        self.version = version
        self.missing: set[str] = set()
        self._shapes: list[torch.Size] = []

    def _own(self) -> dict[str, torch.Tensor]:
        """Views of the model's tensors under the names of Hugging Face files."""
        return dict(to_hf_names(named_tensors(self._runner.model)))

    def from_disk(self, path: str) -> str:
        """Loads a Hugging Face folder of the same architecture. Raises UserError, with the old weights in place."""
        try:
            self._check_config(Path(path))
            tensors = dict(load_state(path))
        except UserError:
            raise
        except (OSError, SafetensorError, KeyError, ValueError) as error:  # ValueError: what is no JSON, or no text
            raise UserError(f"can't read weights from {path}: {error}") from error
        self._replace(tensors.items(), complete=True, where=path)
        self.path = path
        return "Succeeded to update model weights."

    def _check_config(self, folder: Path) -> None:
        file = folder / "config.json"
        if not file.is_file():
            raise UserError(f"{folder} is no Hugging Face folder: config.json is missing")
        kind = json.loads(file.read_text()).get("model_type")
        if kind != self._runner.model_type:
            raise UserError(f"{folder} holds a {kind} model; this engine serves {self._runner.model_type}")

    def from_bucket(self, payload: str) -> str:
        """Loads some tensors: base64 of a safetensors file. Raises UserError, with the old weights in place."""
        try:
            tensors = load_safetensors(base64.b64decode(payload, validate=True))
        except (ValueError, SafetensorError) as error:
            raise UserError(f"serialized_named_tensors is not base64 of a safetensors file: {error}") from error
        self._replace(tensors.items(), complete=False, where="the bucket")
        return "Success"

    @torch.no_grad()
    def _replace(self, tensors: Iterable[Entry], complete: bool, where: str) -> None:
        own, given = self._own(), dict(to_hf_names(tensors))
        foreign = sorted(set(given) - set(own))
        if foreign:
            raise UserError(f"{where} has a tensor that the model lacks: {foreign[0]} ({len(foreign)} such)")
        for name, tensor in given.items():
            if tensor.shape != own[name].shape:
                raise UserError(f"{name} of {where} has shape {list(tensor.shape)}; the model's is {list(own[name].shape)}")
            if not tensor.is_floating_point():
                raise UserError(f"{name} of {where} has dtype {tensor.dtype}; the model's is {own[name].dtype}")
        lacking = sorted(set(own) - set(given))
        if complete and lacking:
            raise UserError(f"{where} lacks a tensor of the model: {lacking[0]} ({len(lacking)} such)")
        for name, tensor in given.items():
            own[name].copy_(tensor)
        self.missing -= set(given)

    def checksums(self) -> tuple[dict[str, str], str]:
        """Of each tensor, and of all together (weight_checksum over the names of Hugging Face files)."""
        own = self._own()
        return {name: weight_checksum([(name, tensor)])[:16] for name, tensor in own.items()}, weight_checksum(own.items())

    def release(self) -> None:
        """Frees the parameters' memory; their contents are lost."""
        self.missing = set(self._own())
        parameters = list(self._runner.model.parameters())
        self._shapes = [parameter.shape for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.new_empty(0)
        if self._runner.device.type == "cuda":
            torch.cuda.empty_cache()

    def resume(self) -> None:
        """Allocates the parameters again, as zeros."""
        for parameter, shape in zip(self._runner.model.parameters(), self._shapes, strict=True):
            parameter.data = parameter.data.new_zeros(shape)
