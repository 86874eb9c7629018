"""PYTHONPATH=.:tests/analysis python -m planted: the table of causes; with FOLDER CAUSE MAGNITUDE SEED: plants one (a+b and 0.1+0.2 for a pair)."""

from __future__ import annotations

import sys
from pathlib import Path

from planted.causes import CAUSES
from planted.plant import plant

if len(sys.argv) == 1:
    for name, cause in CAUSES.items():
        print(f"{name} ({cause.family}): {cause.meaning}\n    {cause.unit}: {', '.join(f'{size:.3g}' for size in cause.magnitudes)}")
else:
    folder, causes, magnitudes, seed = sys.argv[1:]
    plant(Path(folder), tuple(causes.split("+")), tuple(float(size) for size in magnitudes.split("+")), int(seed))
