"""`miles-submit run`: prepare a run directory or find it again, then launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from miles.cli.check import summary
from miles.cli.inputs import configuration, existing_run
from miles.cli.progress import Progress
from miles.config.compose import dump_config, load_config
from miles.config.exits import OK, UserError
from miles.config.schema import RunConfig, Section
from miles.data.store.files import read_json, seal_bytes
from miles.data.store.metrics import read_metrics
from miles.data.store.run_dir import RunDir, write_plan
from miles.plan.judge import judge
from miles.plan.tier import guarantee
from miles.report.build import build_report
from miles.report.refresh import Refresher
from miles.slurm.launch import launch

S = TypeVar("S", bound=Section)

# What may differ when a run goes on: how far, and how it is looked after; never what it computes.
MAY_CHANGE = ("num_rollout", "cluster.port", "cluster.restarts", "cluster.stop_seconds", "checkpoint", "train.optimizer.lr_decay_steps")


def run(words: list[str], run_dir: Path | None) -> int:
    """Start or resume a run; returns the exit code."""
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    resumed = existing_run(words) if run_dir is None else None
    config = load_config([resumed / "run.yaml"]) if resumed else with_absolute_paths(configuration(words))
    folder = RunDir((resumed or run_dir or Path("runs") / config.name).absolute())
    refuse_errors(config, console)
    if folder.run_yaml.exists():
        refuse_differences(load_config([folder.run_yaml]), config, folder)
        if finished(folder, config):
            console.print(f"already finished: {folder.path}; report: {build_report(folder.path)}")
            return OK
        console.print(f"resuming {folder.path}")
    elif folder.path.exists() and any(folder.path.iterdir()):
        raise UserError(f"{folder.path}: not empty, and not a run; choose another --run-dir")
    folder.path.mkdir(parents=True, exist_ok=True)
    seal_bytes(folder.run_yaml, dump_config(config).encode())
    write_plan(folder, {"summary": dict(summary(config)), "guarantee": guarantee(config).name})

    progress = Progress()
    refresher = Refresher(folder.path)

    def update(status: dict[str, Any]) -> None:
        progress.update(status)
        refresher.poke()

    try:
        code = launch(config, folder, update, lambda line: progress.say(line))
    finally:
        refresher.close()
        progress.close()
    page = build_report(folder.path)
    console.print(f"report: {page}")
    if code == OK:
        console.print(f"finished: {folder.path}")
    return code


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, whatever folder it is resumed from."""

    def fixed(section: S, *names: str) -> S:
        return section.model_copy(update={name: str(Path(value).absolute()) for name in names if (value := getattr(section, name))})

    return config.model_copy(
        update={
            "model": fixed(config.model, "hf_checkpoint"),
            "checkpoint": fixed(config.checkpoint, "ref_load"),
            **{name: fixed(getattr(config, name), "prompt_data") for name in ("data", "warm_start", "eval")},
        }
    )


def finished(folder: RunDir, config: RunConfig) -> bool:
    """Whether the newest attempt ended well and nothing was added since."""
    end = folder.latest / "exit.json"
    done = max((line["step"] for line in read_metrics(folder.metrics)), default=0)
    return end.exists() and read_json(end)["code"] == OK and done >= config.warm_start.steps + config.num_rollout


def refuse_errors(config: RunConfig, console: Console) -> None:
    """Warnings are printed; the first error ends it."""
    findings = judge(config)
    for finding in findings:
        if finding.level == "warning":
            console.print(f"warning: {finding.where}: {finding.message}; {finding.mend}")
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        more = f" ({len(errors) - 1} more: miles-submit check)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0].where}: {errors[0].message}; {errors[0].mend}{more}")


def refuse_differences(old: RunConfig, new: RunConfig, folder: RunDir) -> None:
    """A run goes on as what it is."""
    changed = [key for key in _differences(old.model_dump(), new.model_dump(), "") if not key.startswith(MAY_CHANGE)]
    if changed:
        keys = ", ".join(changed[:4]) + (", …" if len(changed) > 4 else "")
        raise UserError(f"{folder.path}: holds a run with another configuration ({keys}); resume it with `miles-submit run {folder.path}`, or choose another --run-dir")


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str) -> list[str]:
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}")
    return found
