"""Where compiled kernels are kept: a folder named after the source of their building blocks, since numba itself notices only a change of a
kernel's own file. It lies under NUMBA_CACHE_DIR, else the user's cache folder, else (nothing writable) it is a temporary one.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def cache_folder(*sources: Path) -> str:
    """The folder for kernels that are built of these files, made if need be."""
    content = b"".join(source.read_bytes() for source in sources)
    base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / f"miles-kernels-{hashlib.sha256(content).hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except OSError:
        return tempfile.mkdtemp(prefix="miles-kernels-")
