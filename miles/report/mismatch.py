"""What the report page says of the mismatch between rollout and training; who analyses it is above this package."""

from __future__ import annotations

from dataclasses import dataclass, field

from miles.report.plain_page import Verdict


@dataclass
class Mismatch:
    """A verdict, what it was taken from and (name, value) of metrics, or with `verdict` None the reason why there is none, in `facts`.

    causes: (name, share, evidence).
    """

    verdict: Verdict | None
    facts: str
    metrics: list[tuple[str, str]] = field(default_factory=list)
    causes: list[tuple[str, str, str]] = field(default_factory=list)


def unknown(why: str) -> Mismatch:
    """No verdict, and the reason."""
    return Mismatch(None, why)
