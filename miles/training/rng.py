"""States of the random generators of one rank, in a safetensors file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from miles.data.store.files import Damaged

SCHEMA = "miles.rng/1"


def save_rng(path: Path) -> None:
    """Write the states of torch's (CPU and this device), numpy's and Python's generators."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert name == "MT19937", "numpy's global generator"
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    # repr of a float and its parse are exact inverses, and JSON uses them
    rest = {"python": [version, gauss], "numpy": [int(position), int(has_gauss), float(cached)]}
    save_file(tensors, path, metadata={"schema": SCHEMA, "scalars": json.dumps(rest)})


def load_rng(path: Path) -> None:
    """Put the generators back. Damaged names the file when it is another kind."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("schema") != SCHEMA:
            raise Damaged(f"{path}: carries schema {metadata.get('schema')}; expected {SCHEMA}")
        rest = json.loads(metadata["scalars"])
        torch.set_rng_state(file.get_tensor("torch"))
        position, has_gauss, cached = rest["numpy"]
        np.random.set_state(("MT19937", file.get_tensor("numpy").numpy().astype(np.uint32), position, has_gauss, cached))
        version, gauss = rest["python"]
        random.setstate((version, tuple(file.get_tensor("python").tolist()), gauss))
        if "cuda" in file.keys() and torch.cuda.is_available():  # noqa: SIM118  # safe_open is no mapping
            torch.cuda.set_rng_state(file.get_tensor("cuda"))
