"""Filters of groups (dynamic sampling): `keep(group) -> bool | str`, where a text is the reason to drop the group.

Which groups a batch gets is decided in draw order by the service, so a filter that depends on its group alone is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from miles.data.sample import Sample, Status

Filter = Callable[[list[Sample]], bool | str]


def check_reward_nonzero_std(group: list[Sample]) -> bool | str:
    """Drop a group whose rewards are all alike: it has no advantage to learn from."""
    rewards = np.array([sample.reward for sample in group], np.float64)
    return True if rewards.std() > 1e-8 else f"zero_std_{rewards[0]:g}"


def check_no_aborted(group: list[Sample]) -> bool | str:
    """Drop a group with an aborted sample."""
    return "aborted" if any(sample.status == Status.ABORTED for sample in group) else True


def reason_to_drop(keep: Filter, group: list[Sample]) -> str | None:
    """Verdict of a filter as the service records it: None keeps. Raises TypeError for anything but a bool or a text."""
    verdict = keep(group)
    if isinstance(verdict, str):
        return verdict
    if not isinstance(verdict, bool | np.bool_):
        raise TypeError(f"a filter answers True, False or a reason, not {type(verdict).__name__}")
    return None if verdict else "filtered"
