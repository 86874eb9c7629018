"""A user's function that needs torch, as most do."""

from __future__ import annotations

import torch
from stamp import stamp


def first_line() -> str:
    """Stamps."""
    stamp("payload")
    return torch.__version__
