"""What a hand-written batch script starts: `python -m imports ROLE` imports what a role of a run does, and stamps."""

from __future__ import annotations

import importlib
import sys

from stamp import stamp

if __name__ == "__main__":
    importlib.import_module(f"miles.run.{sys.argv[1]}")
    stamp(sys.argv[1])
