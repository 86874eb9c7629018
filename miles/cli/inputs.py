"""From what a person typed to a configuration or a run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from miles.config.compose import load_config
from miles.config.exits import UserError
from miles.config.options import parse_flags
from miles.config.schema import RunConfig
from miles.config.section import Section
from miles.plan.judge import Finding, judge
from miles.plan.model_folder import unusable
from miles.plan.own_functions import unusable_functions

S = TypeVar("S", bound=Section)


def configuration(words: list[str], kept: Mapping[str, Any] | None = None) -> RunConfig:
    """The configuration of YAML files, key=value overrides and public flags, in any order. Raises ConfigError.

    kept: dotted path to the value of a key that the words don't give."""
    paths, overrides, flags = parse_flags(words)
    if not (paths or overrides or flags):
        raise UserError("nothing to read; give a recipe, such as recipes/quickstart")
    return load_config(paths, overrides, flags, kept)


def existing_run(words: list[str]) -> tuple[Path, RunConfig] | None:
    """The run directory and its configuration, if that is what was typed (overrides and flags beside it win)."""
    paths, overrides, flags = parse_flags(words)
    if len(paths) != 1 or not (paths[0] / "run.yaml").is_file():
        return None
    return paths[0], load_config([paths[0] / "run.yaml"], overrides, flags)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, whatever folder it is resumed from."""

    def fixed(section: S, *names: str) -> S:
        return section.model_copy(update={name: str(Path(value).absolute()) for name in names if (value := getattr(section, name))})

    return config.model_copy(
        update={
            "model": fixed(config.model, "hf_checkpoint"),
            "checkpoint": fixed(config.checkpoint, "ref_load", "load"),
            "cluster": config.cluster.model_copy(update={"slurm": fixed(config.cluster.slurm, "exclude_file")}),
            "debug": fixed(config.debug, "train_only", "rescore"),
            **{name: fixed(getattr(config, name), "prompt_data") for name in ("data", "warm_start", "eval")},
        }
    )


def plain_findings(config: RunConfig, roots: Sequence[str] = ()) -> list[Finding]:
    """What is wrong with the settings and with the heads of the files that they name, errors first; prompts are not read.

    roots: as for findings."""
    found = judge(config)
    if not any(finding.level == "error" for finding in found):
        found = [*(Finding(*entry) for entry in (*unusable(config), *unusable_functions(config, roots))), *found]
    return found


def findings(config: RunConfig, roots: Sequence[str] = ()) -> list[Finding]:
    """What is wrong with a run before it starts, errors first: the settings, then what the files that they name hold.

    roots: folders of the run's functions, besides those of this command.
    """
    from miles.data.prompts import check_files  # numpy: nothing that a mere reader of configurations waits for
    from miles.data.recorded import check_recording, differences

    found = judge(config)
    if not any(finding.level == "error" for finding in found):
        opened = [Finding(*entry) for entry in (*unusable(config), *unusable_functions(config, roots))]
        try:
            check_files(config)
            if config.debug.recorded:
                check_recording(config)
            if config.debug.train_only and (changed := differences(config)):
                opened.append(Finding("warning", "debug.train_only", f"settings differ from the recorded run's, so its bits are not to be expected: {', '.join(changed)}"))
        except UserError as error:
            where, _, rest = str(error).partition(": ")
            message, _, mend = rest.rpartition("; ")
            opened.append(Finding("error", where, message, mend) if message else Finding("error", where, rest))
        found = opened + found
    return found
