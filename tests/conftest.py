"""How the suite is divided over worker processes (make test: two of them)."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
# The longest first, so that no worker is left alone with one at the end.
FIRST = ("end_to_end", "bad_input", "training", "rollout", "sync", "engine")


def group_of(path: Path) -> str:
    """What stays in one worker: a folder, since its fixtures of the session are made once there."""
    return path.relative_to(HERE).parts[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.hasplugin("xdist"):
        return
    groups = {item: group_of(item.path) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: FIRST.index(groups[item]) if groups[item] in FIRST else len(FIRST))
