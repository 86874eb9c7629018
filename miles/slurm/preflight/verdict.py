"""What a probe says of a node. A probe that could not run says so: it never says ok."""

from __future__ import annotations

from typing import Any

OK, SLOW, BROKEN, NOT_CHECKED = "ok", "slow", "broken", "not checked"
BAD = (SLOW, BROKEN)
Verdict = dict[str, Any]  # status, detail, and numbers by name


def ok(detail: str, **numbers: Any) -> Verdict:
    """Tested and good."""
    return {"status": OK, "detail": detail, **numbers}


def slow(detail: str, **numbers: Any) -> Verdict:
    """Works, but holds the others up."""
    return {"status": SLOW, "detail": detail, **numbers}


def broken(detail: str, **numbers: Any) -> Verdict:
    """The run could not do with this node."""
    return {"status": BROKEN, "detail": detail, **numbers}


def not_checked(why: str, **numbers: Any) -> Verdict:
    """Not tested, and why."""
    return {"status": NOT_CHECKED, "detail": why, **numbers}
