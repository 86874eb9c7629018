"""Numbers that are none: NaN in weights is told of, or refused."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from miles.config.exits import UserError


class NanWatch:
    """Looks through the strips of one file of the output. strict: the first NaN is a UserError."""

    def __init__(self, folder: Path, strict: bool) -> None:
        self.folder, self.strict = folder, strict
        self.names: set[str] = set()

    def look(self, strip: Tensor, name: str) -> None:
        """name: of the source's tensor that the strip is a part of."""
        if strip.numel() and strip.is_floating_point() and bool(torch.isnan(strip.max())):
            self.names.add(name)
            if self.strict:
                raise UserError(f"{self.folder}: NaN in {name}; restore the source, or leave --strict out")


def nan_warnings(records: list[dict[str, list[str]]]) -> list[str]:
    """One line about all tensors with NaN, of what the files' records say under "nan"."""
    names = sorted({name for record in records for name in record["nan"]})
    return [f"NaN in {names[0]} ({len(names)} such {'tensor' if len(names) == 1 else 'tensors'})"] if names else []
