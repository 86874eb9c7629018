"""Where a run's functions by import path are found: the folders of its first start, from wherever it is resumed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from miles.data.store.run_dir import RunDir, read_provenance


def import_roots(run_dir: RunDir) -> list[str]:
    """Folders to look in, in order: those that the run's attempts recorded, as far as they still exist, then this process's
    working folder and PYTHONPATH. Absolute paths, each once."""
    recorded = recorded_roots(run_dir)
    here = [os.getcwd(), *(str(Path(entry).absolute()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry)]
    return [folder for folder in dict.fromkeys([*recorded, *here]) if os.path.isdir(folder)]


def recorded_roots(run_dir: RunDir, epoch: int | None = None) -> list[str]:
    """What provenance.json says of an attempt, default the newest; empty where it says nothing."""
    attempts = [entry for entry in read_provenance(run_dir)["attempts"] if epoch in (None, entry.get("epoch"))]
    return list(attempts[-1].get("import_roots", [])) if attempts else []


def use_import_roots(run_dir: RunDir, epoch: int) -> None:
    """Put the roots of this attempt first on this process's path, where `python -m` has the working folder."""
    roots = recorded_roots(run_dir, epoch)
    sys.path[:] = [*roots, *(entry for entry in sys.path if entry not in roots)]
