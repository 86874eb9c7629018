"""Corrections of the mismatch that a run could have used, and the bounds at which the pass counts, so that each is judged exactly in one pass.

A token's ratio is rho = e^c, c = d held to ±LIMIT, in fp32 as in training; a sequence's is e^S with S = sum of d, its geometric mean e^(S/n).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HIGHS = (1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 100.0)  # upper bounds of a weight
LOWS = (0.9, 0.8, 0.5, 0.2, 0.1, 0.01, 0.001)  # lower ones
WIDTHS = (*(digit * 10.0**decade for decade in (-6, -5, -4, -3, -2) for digit in (1, 2, 5)), 0.1, 0.2, 0.5)  # of bounds 1 - x, 1 + x of a geometric mean
VETOES = (1e-2, 1e-3, 1e-4)  # a sequence with a token whose ratio is below is dropped
WEIGHT_BINS = 1 + len(HIGHS) + len(LOWS)  # of weights: within the first of both, above each of HIGHS, below each of LOWS
MEAN_BINS = 1 + 2 * len(WIDTHS)  # of geometric means: within the first width, above 1 + each, below 1 - each
VETO_BINS = 1 + len(VETOES)
TOKEN_COLUMNS = ("tokens", "t", "t2", "abs_t")  # of each bin of weights; t = rho - 1
CLASS_COLUMNS = WEIGHT_BINS * len(TOKEN_COLUMNS) + 2  # and the sequences and tokens of a class of sequences
CLASSES = MEAN_BINS * VETO_BINS  # of sequences: by geometric mean and by least ratio
SEQUENCE_COLUMNS = ("sequences", "tokens", "t", "t2", "abs_t")
DENSITY = 64  # bins of -log-prob on either side, a quarter of a nat each; the last holds what is beyond
SAMPLED = 4  # every so many-th token of a sequence is in the density: a picture needs no more


@dataclass(frozen=True)
class Setting:
    """level: what has a weight, "token" or "sequence". mode: what becomes of a weight beyond low and high: "off" (all weigh 1), "truncate", or "mask"
    (it weighs nothing). geometric: bounds of a sequence's mean beyond which it is dropped; veto: a token's ratio below which its sequence is."""

    name: str
    level: str = "token"
    mode: str = "off"
    low: float = 0.0
    high: float = math.inf
    geometric: tuple[float, float] | None = None
    veto: float | None = None


FIXED = (
    Setting("no correction"),
    Setting("plain ratio", mode="truncate"),
    *(Setting(f"TIS up to {high:g}", mode="truncate", high=high) for high in (1.2, 1.5, 2.0, 3.0, 5.0)),
    Setting("TIS 0.5 to 1.5", mode="truncate", low=0.5, high=1.5),
    Setting("TIS 0.5 to 2", mode="truncate", low=0.5, high=2.0),
    Setting("IcePop, MIS token mask 0.5 to 2", mode="mask", low=0.5, high=2.0),
    Setting("IcePop, MIS token mask 0.5 to 5", mode="mask", low=0.5, high=5.0),
    Setting("IcePop, MIS token mask 0.2 to 5", mode="mask", low=0.2, high=5.0),
    Setting("MIS sequence, plain ratio", "sequence", "truncate"),
    Setting("MIS sequence up to 2", "sequence", "truncate", high=2.0),
    Setting("MIS sequence up to 5", "sequence", "truncate", high=5.0),
    Setting("MIS sequence mask 0.5 to 2", "sequence", "mask", 0.5, 2.0),
    Setting("geometric 0.99 to 1.001", geometric=(0.99, 1.001)),
    *(Setting(f"veto {veto:g}", veto=veto) for veto in VETOES),
    Setting("TIS up to 2, veto 0.0001", mode="truncate", high=2.0, veto=1e-4),
    Setting("TIS 0.5 to 1.5, geometric 0.99 to 1.001", mode="truncate", low=0.5, high=1.5, geometric=(0.99, 1.001)),
)
