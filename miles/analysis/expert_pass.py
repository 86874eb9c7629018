"""A loaded chunk's routes into the sums by expert, read piece by piece: they are many times larger than all else together. Where none are recorded, nothing is done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis.columns import Sheet, check_offsets
from miles.analysis.expert_kernel import BY_EXPERT, WHOLE, add_tokens, end_sequence
from miles.analysis.experts import Experts
from miles.analysis.load import Loaded
from miles.analysis.rows import Part
from miles.analysis.sequences import group_hash
from miles.analysis.source import Step
from miles.data.store import routes as route_store
from miles.data.store.files import Damaged
from miles.data.store.manifest import NAME

LOOKED_AT = 1 << 24  # expert numbers of a chunk, about: where it has more, groups of siblings are drawn by their hash
PIECE = 1 << 22  # expert numbers read at a time
MOST_EXPERTS = 2048  # of a layer; a greater number is damage


class RouteFile:
    """Routes beside a shard, checked against it: expert u8 or u16 [rows, layers, top_k], sequence i64 [Q] rows of the shard, offset i64 [Q + 1]."""

    def __init__(self, path: Path, part: Part) -> None:
        self.sheet = Sheet(path, route_store.SCHEMA)
        try:
            self.offset = check_offsets(self.sheet, "offset", ["expert"])
            self.sequence = self.sheet.whole("sequence").astype(np.int64)
            self.dtype, shape = self.sheet.kind("expert")
            if len(shape) != 3 or self.dtype not in (np.uint8, np.uint16) or not all(shape[1:]):
                raise Damaged(f"{path}: /expert is {self.dtype} of shape {shape}; u8 or u16 [rows, layers, top_k] expected")
            self.shape = (shape[1], shape[2])
            sizes, there = np.diff(part.offset), self.sequence < len(part.offset) - 1
            if len(self.sequence) != len(self.offset) - 1 or (np.diff(self.sequence) <= 0).any() or not there.all():
                raise Damaged(f"{path}: /sequence doesn't list rows of {part.sheet.path} in order, with one offset each; files of two runs are mixed")
            if (wrong := np.flatnonzero(np.diff(self.offset) != sizes[self.sequence] - 1)).size:
                row = self.sequence[wrong[0]]
                raise Damaged(f"{path}: row {row} has {np.diff(self.offset)[wrong[0]]} routes, and {sizes[row]} tokens in {part.sheet.path}; one less expected; files of two runs are mixed")
        except BaseException:
            self.sheet.close()
            raise


class ExpertPass:
    """Chunks are taken one by one; what is added depends on the chunk alone. Files stay open while chunks are of one step."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._files: dict[Path, RouteFile | None] = {}
        self._buffer = np.zeros(0, np.uint8)

    def add(self, experts: Experts, loaded: Loaded) -> None:
        """Add a chunk."""
        step = loaded.chunk.step
        if not step.manifest.routes:
            return
        if step.folder != self._folder:
            self.close()
            self._folder = step.folder
        beside = [self._beside(experts, step, part) for part in loaded.parts]
        shapes = {file.shape for file in beside if file}
        if not shapes:
            return
        layers, each = max(shapes)
        if len(shapes) > 1:
            raise Damaged(f"{step.folder}: its route files have {' and '.join(f'{a} layers with {b} experts a token' for a, b in sorted(shapes))}; files of two runs are mixed")
        share = LOOKED_AT / max(loaded.chunk.tokens * layers * each, 1)
        chosen = np.flatnonzero((group_hash(loaded) >> np.uint64(32)) < share * 2.0**32)
        table: NDArray[Any] = np.zeros((layers, 0, 2))
        latest: NDArray[Any] = np.zeros((layers, 0), np.int64)
        found: NDArray[Any] = np.zeros((layers, 0, len(BY_EXPERT)))
        whole = np.zeros(len(WHOLE))
        stamp = 0
        for i in chosen.tolist():
            file = beside[loaded.part_of[i]]
            place = -1 if file is None else int(np.searchsorted(file.sequence, loaded.row[i]))
            if file is None or place == len(file.sequence) or file.sequence[place] != loaded.row[i]:
                continue
            count, total = 0, 0.0
            for experts_here, mu, mask, o in self._pieces(file, place, loaded, i):
                if (most := int(experts_here.max()) + 1) > table.shape[1]:
                    if most > MOST_EXPERTS:
                        raise Damaged(f"{file.sheet.path}: names expert {most - 1} of a layer")
                    table, latest, found = (np.pad(array, [(0, 0), (0, most - array.shape[1]), (0, 0)][: array.ndim]) for array in (table, latest, found))
                more, size = add_tokens(experts_here, mu, mask, o, table, latest, stamp)
                count, total, stamp = count + more, total + size, stamp + more
            if count:
                end_sequence(table, float(count), total, found, whole)
        experts.add(found, whole, (layers, each))

    def close(self) -> None:
        """Close the files of the step."""
        for file in self._files.values():
            if file:
                file.sheet.close()
        self._files = {}

    def _beside(self, experts: Experts, step: Step, part: Part) -> RouteFile | None:
        """The route file that shares the shard's name after the first dot; None where there is none."""
        path = part.sheet.path
        if path not in self._files:
            entries = [each for each in step.manifest.routes if each.name.partition(".")[2] == path.name.partition(".")[2]]
            file = step.folder / entries[0].name if entries else None
            if file and not file.is_file():
                experts.gone.add(f"{step.step}/{file.name}")
                file = None
            if file and (size := file.stat().st_size) != entries[0].bytes:
                raise Damaged(f"{file}: {entries[0].bytes} bytes expected by {NAME}, {size} found")
            self._files[path] = RouteFile(file, part) if file else None
        return self._files[path]

    def _pieces(self, file: RouteFile, place: int, loaded: Loaded, i: int) -> Iterator[tuple[NDArray[Any], ...]]:
        """Of a sequence: routes, and log-probs and mask of the tokens that they led to, from the first one under the mask to the last."""
        columns, length = loaded.columns, int(loaded.length[i])
        a, b = int(loaded.shard_start[i]), int(loaded.train_start[i])
        under = np.flatnonzero(columns["loss_mask"][a : a + length])
        if not len(under) or not under[-1]:
            return
        width = file.shape[0] * file.shape[1]
        rows = max(1, PIECE // width)
        for first in range(max(int(under[0]), 1), int(under[-1]) + 1, rows):
            last = min(first + rows, int(under[-1]) + 1)
            held = self._take(file.dtype, (last - first) * width).reshape(last - first, *file.shape)
            file.sheet.read("expert", int(file.offset[place]) + first - 1, held)  # a token's log-prob came of the pass at the token before it
            yield held, columns["rollout_logprob"][a + first : a + last], columns["loss_mask"][a + first : a + last], columns["train_logprob"][b + first : b + last]

    def _take(self, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        """An array that is used again."""
        if len(self._buffer) < count * dtype.itemsize:
            self._buffer = np.zeros(count * dtype.itemsize, np.uint8)
        return self._buffer[: count * dtype.itemsize].view(dtype)
