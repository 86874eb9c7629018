"""Every sequence of a run, read with h5py alone: shares nothing with miles.analysis."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np


@dataclass
class Row:
    """A sequence: its numbers, its token arrays, (start, version) pairs, and its routes [T − 1, layers, top_k] or None."""

    step: int
    now: int
    numbers: dict[str, Any]
    engine: str
    source: str
    tokens: dict[str, np.ndarray]
    runs: list[tuple[int, int]] = field(default_factory=list)
    routes: np.ndarray | None = None

    def version(self, place: int) -> int:
        return [version for start, version in self.runs if start <= place][-1]


def rows_of(run: Path, folder: str = "batches") -> list[Row]:
    """In order of steps, shards and rows."""
    found = []
    for manifest_path in sorted((run / folder).glob("step_??????/manifest.json")):
        manifest = json.loads(manifest_path.read_text())
        for entry in manifest["shards"]:
            path = manifest_path.parent / entry["name"]
            routes = {}
            beside = path.with_name(path.name.replace("rollout", "routes"))
            if beside.exists():
                with h5py.File(beside) as file:
                    ends = file["offset"][:].astype(int)
                    routes = {int(row): file["expert"][ends[i] : ends[i + 1]] for i, row in enumerate(file["sequence"])}
            with h5py.File(path) as file:
                offset = file["sequences/offset"][:].astype(int)
                pairs = list(zip(file["runs/sequence"][:].tolist(), file["runs/start"][:].tolist(), file["runs/weight_version"][:].tolist(), strict=True))
                names = {name: [str(each) for each in file[f"sequences/{name}"].attrs["names"]] for name in ("engine", "source")}
                for i in range(len(offset) - 1):
                    numbers = {name: file[f"sequences/{name}"][i].item() for name in ("prompt_length", "draw", "sample", "reward", "status", "cached_tokens")}
                    tokens = {name: file[f"tokens/{name}"][offset[i] : offset[i + 1]] for name in ("token_id", "flags", "loss_mask", "rollout_logprob")}
                    where = {name: names[name][file[f"sequences/{name}"][i]] for name in names}
                    runs = [(start, version) for row, start, version in pairs if row == i]
                    found.append(Row(manifest["step"], manifest["policy"]["weight_version"], numbers, where["engine"], where["source"], tokens, runs, routes.get(i)))
    return found
