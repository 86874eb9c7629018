"""Exit codes of every process, and the exceptions that choose them. The table is in docs/formats.md."""

OK = 0  # finished
AGAIN = 75  # try again: requeue
WRONG = 78  # the configuration or the input is wrong: never requeue


class UserError(ValueError):
    """A user's mistake. Its text is one line: what is wrong, where, and the mend. Processes exit with WRONG."""


class ConfigError(UserError):
    """The configuration is wrong."""


class TryAgain(Exception):
    """Not the run's fault (fenced off, coordinator lost, stopped on request): nothing more is written. Processes exit with AGAIN."""
