"""From what a person typed to a configuration or a run directory."""

from __future__ import annotations

from pathlib import Path

from miles.config.compose import load_config
from miles.config.exits import UserError
from miles.config.options import parse_flags
from miles.config.schema import RunConfig


def configuration(words: list[str]) -> RunConfig:
    """The configuration of YAML files, key=value overrides and public flags, in any order. Raises ConfigError."""
    paths, overrides, flags = parse_flags(words)
    if not (paths or overrides or flags):
        raise UserError("nothing to read; give a recipe, such as recipes/quickstart")
    return load_config(paths, overrides, flags)


def existing_run(words: list[str]) -> Path | None:
    """The run directory, if that is what was typed."""
    if len(words) == 1 and (Path(words[0]) / "run.yaml").is_file():
        return Path(words[0])
    return None
