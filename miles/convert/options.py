"""What may be chosen for a conversion to torch_dist, and how MTP layers that the source does not have are made up."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from miles.config.exits import UserError
from miles.convert.contradictions import mtp_contradiction
from miles.convert.hf_source import HfSource
from miles.convert.model_files import source_mtp_layers
from miles.models.maps.find import Known
from miles.models.maps.pieces import Piece

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
INIT_MTP = ("copy-last", "random")


@dataclass(frozen=True)
class Options:
    """mtp_layers: MTP layers to include. init_mtp: how to make them up where the source has none (copy-last, random). dtype: of the
    checkpoint (None: the source's). strict: refuse NaN instead of warning. UserError for what can't be."""

    mtp_layers: int = 0
    init_mtp: str | None = None
    make_vocab_size_divisible_by: int = 1
    tensor_parallel: int = 1
    dtype: str | None = None
    strict: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mtp_layers < 0:
            raise UserError(f"{self.mtp_layers} MTP layers can't be included; give --mtp-num-layers a number of at least 0")
        if self.init_mtp is not None and self.init_mtp not in INIT_MTP:
            raise UserError(f"--init-mtp {self.init_mtp!r} is not known; known: {', '.join(INIT_MTP)}")
        if self.init_mtp is not None and not self.mtp_layers:
            raise UserError("--init-mtp makes MTP layers up, but none are asked for; say how many with --mtp-num-layers")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype!r} is not known; known: {', '.join(DTYPES)}")


def check_mtp(known: Known, layers: int, where: str | Path) -> None:
    """UserError where MTP layers are asked for that this family does not have."""
    if layers and not known.family.mtp:
        raise UserError(f"{where}: model_type {known.config.get('model_type')!r} has no MTP layers that this tool knows; leave --mtp-num-layers out")


class MtpLayers:
    """Where MTP layers come from: the source, copies of its last layer, or random numbers. UserError where they can't come from anywhere."""

    def __init__(self, known: Known, hf: HfSource, options: Options) -> None:
        self.known, self.hf, self.options = known, hf, options
        self.made = self._made()

    def _made(self) -> str | None:
        """None where the source has them or none are asked for."""
        options, hf = self.options, self.hf
        if not options.mtp_layers:
            return None
        check_mtp(self.known, options.mtp_layers, hf.folder)
        there = source_mtp_layers(self.known, hf.stored)
        if there >= options.mtp_layers:
            return None
        if there or options.init_mtp is None:
            mend = f"ask for {there}" if there else "leave --mtp-num-layers out, or make them up with --init-mtp copy-last or random"
            why = mtp_contradiction(self.known, hf.stored, there)
            raise UserError(f"{hf.folder}: {options.mtp_layers} MTP layers asked for, the source has {there}{f' ({why})' if why else ''}; {mend}")
        return options.init_mtp

    def is_made(self, piece: Piece) -> bool:
        """Whether a piece is not the source's."""
        return self.made is not None and piece.key.startswith("mtp.")

    def is_random(self, piece: Piece) -> bool:
        """Whether a piece has no values of the source at all."""
        return self.is_made(piece) and (self.made == "random" or self.source_of(piece.blocks[0].name) not in self.hf)

    def source_of(self, name: str) -> str:
        """The source's tensor, or the one that is copied in place of a missing MTP layer's."""
        first = self.known.full("model.layers.")
        last = self.known.config.layers - 1
        if self.made != "copy-last" or not name.startswith(first):
            return name
        number, _, rest = name.removeprefix(first).partition(".")
        return f"{first}{last}.{rest}" if int(number) > last else name

    def random(self, piece: Piece, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows [first, last) of a piece: norms 1, biases 0, matrices with the standard deviation that config.json names."""
        size = (last - first, *piece.shape[1:])
        if len(size) == 1:
            return torch.full(size, 0.0 if piece.key.endswith("bias") else 1.0).to(dtype)
        seed = int.from_bytes(hashlib.sha256(f"{self.options.seed} {piece.key} {piece.lead} {first}".encode()).digest()[:7], "big")
        return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * float(self.known.config.get("initializer_range", 0.02))).to(dtype)
