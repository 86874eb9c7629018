"""What a conversion will take, before it: bytes, memory, time. From config.json alone, so that it works before the download."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miles.convert.conversion import CHUNK_BYTES, FILE_BYTES
from miles.models.maps.find import known_folder
from miles.models.maps.pieces import padded_vocabulary, pieces

GB_PER_SECOND = 1.0  # of one node's disk, where none is given


@dataclass(frozen=True)
class Estimate:
    """bytes: of the checkpoint at 2 bytes a number; memory: anonymous, a process; seconds: at the given GB/s."""

    family: str
    parameters: int
    tensors: int
    bytes: int
    files: int
    memory: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(folder: str | Path, mtp_layers: int = 0, divisible_by: int = 1, workers: int = 1, rate: float = GB_PER_SECOND) -> Estimate:
    """Of converting a folder with a config.json to torch_dist in bfloat16."""
    known = known_folder(folder)
    rows = padded_vocabulary(known.config.number("vocab_size"), divisible_by, 1)
    total, keys = 0, set()
    for piece in pieces(known, mtp_layers=mtp_layers, rows=rows):
        count = 1
        for number in piece.shape:
            count *= number
        total += count
        keys.add(piece.key)
    amount = 2 * total
    return Estimate(str(known.config.get("model_type")), total, len(keys), amount, -(-amount // FILE_BYTES), 3 * CHUNK_BYTES * workers, amount / 1e9 / rate)
