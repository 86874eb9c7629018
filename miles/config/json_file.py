"""Objects in JSON files that come with a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from miles.config.exits import ConfigError

RESTORE = "restore it from the checkpoint's origin"


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file. ConfigError, one line that begins with the path, where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {RESTORE}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({' '.join(str(error).split())[:120]}); {RESTORE}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: not a JSON object; {RESTORE}")
    return found
