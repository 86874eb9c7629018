"""How the suite is divided over worker processes (make test: two of them)."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# What a script starts in the background inherits that Ctrl-C is ignored, and so would the commands that are tested with one.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What a terminal or a CI says of itself changes what programs print; tests that want colours or a width ask for them.
for name in ("CLICOLOR_FORCE", "COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "LINES", "NO_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)
os.environ["TERM"] = "xterm-256color"

HERE = Path(__file__).parent
# The longest first, so that no worker is left alone with one at the end; Slurm's wait more than they compute, beside those that compute.
FIRST = ("end_to_end", "slurm", "bad_input", "training", "rollout", "sync", "engine")


class ByFolder(LoadScopeScheduling):
    """A folder's tests stay in one worker: its fixtures of the session are made once there."""

    def _split_scope(self, nodeid: str) -> str:
        return Path(nodeid.partition("::")[0]).parts[1]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFolder:
    return ByFolder(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folders = {item: item.path.relative_to(HERE).parts[0] for item in items}
    items.sort(key=lambda item: FIRST.index(folders[item]) if folders[item] in FIRST else len(FIRST))
