"""The undisturbed runs that the others are compared with."""

from calm_runs import calm as undisturbed  # noqa: F401
from calm_runs import calm_two as undisturbed_two  # noqa: F401
