"""Reading a torch.save file that others wrote: tensors, numpy arrays and plain values, by an allow-list; anything else is refused by name."""

from __future__ import annotations

import _codecs
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miles.config.exits import UserError

DTYPES = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
REFUSED = re.compile(r"(?:GLOBAL|class|type|function) [`']?(\w+(?:\.\w+)+)")


def allowed() -> list[Any]:
    """What numpy's arrays and numbers are rebuilt with, under their names in numpy 1 and 2; none of them runs code out of the file."""
    array, scalar = np._core.multiarray._reconstruct, np._core.multiarray.scalar  # type: ignore[attr-defined]
    names = [(each, f"numpy.{core}.multiarray.{name}") for each, name in ((array, "_reconstruct"), (scalar, "scalar")) for core in ("core", "_core")]
    return [*names, np.ndarray, np.dtype, _codecs.encode, *(type(np.dtype(name)) for name in DTYPES)]


def read_dump(path: Path) -> dict[str, Any]:
    """A dump that holds an object of plain values. UserError: missing, cut off, not written by torch.save, or with a class that is not on the list."""
    try:
        with torch.serialization.safe_globals(allowed()):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path}: {(error.strerror or '').lower()}; give dumps of slime or miles (.pt)") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {_why(str(error))}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:  # torch's and zip's, over bytes that are not as they were written
        raise UserError(f"{path}: no whole torch.save file ({' '.join(str(error).split())[:160] or type(error).__name__}); it may have been cut off") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: an object expected, {type(value).__name__} found; give dumps of slime or miles")
    return value


def _why(text: str) -> str:
    """Out of torch's page of advice the one class that it is about."""
    found = [name for name in REFUSED.findall(text) if not name.startswith("torch.serialization")]
    if not found:
        return f"no file that torch.save wrote ({' '.join(text.split())[:120]})"
    return f"holds {found[0]}, which is not read from dumps: tensors, numpy arrays and plain values alone are, since anything else can run code; save samples by to_dict()"
