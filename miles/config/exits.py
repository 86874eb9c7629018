"""Exit codes, and the two exceptions that choose them. The table is in docs/formats.md."""

from __future__ import annotations

OK = 0
AGAIN = 75
WRONG = 78


class UserError(ValueError):
    """A user's mistake: its text is the one line that says what is wrong, where, and the mend. Exit 78."""


class TryAgain(Exception):
    """Not the run's fault (fenced off, coordinator lost, stopped on request): nothing is written any more. Exit 75."""


class ConfigError(UserError):
    """The configuration is wrong."""
