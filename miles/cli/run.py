"""`miles-submit run`: prepare a run directory or find it again, then launch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from miles.cli.check import summary
from miles.cli.inputs import configuration, existing_run, findings, with_absolute_paths
from miles.cli.progress import Progress
from miles.cli.submit import refuse, refuse_in_use, submit_run
from miles.config.address import bind_host
from miles.config.compose import dump_config, load_config
from miles.config.exits import AGAIN, OK, UserError, disk_full
from miles.config.schema import RunConfig
from miles.data.store.epoch import Fenced
from miles.data.store.files import TEMPORARY_SUFFIX, seal_bytes
from miles.data.store.import_roots import recorded_roots
from miles.data.store.results import has_results
from miles.data.store.run_dir import RunDir, write_plan
from miles.plan.tier import guarantee
from miles.report.build import build_report
from miles.report.records import read_run, require_run_dir
from miles.report.refresh import Refresher
from miles.report.summary import summarise
from miles.slurm.launch import launch
from miles.slurm.meeting import hold_port
from miles.slurm.progress import finished
from miles.slurm.sole import only_launcher
from miles.slurm.submission import by_hand, prepare, write
from miles.slurm.tracked import tracked

DECAY = "train.optimizer.lr_decay_steps"

# What may differ when a run goes on: how far, and how it is looked after; never what it computes (threads: the same to the last bits,
# so the guarantee falls, and the launcher says so).
MAY_CHANGE = {
    "num_rollout", "cluster.threads", "cluster.port", "cluster.restarts", "cluster.stop_seconds", "debug.stop_after", "debug.rescore_steps",
    "profile.steps", "profile.record_shapes", "profile.with_stack",
    "checkpoint.save_interval", "checkpoint.retain", "checkpoint.save_hf",
    "checkpoint.retain_batches", "checkpoint.retain_batches_days", "checkpoint.retain_batches_bytes",
}  # fmt: skip
FREE = ("cluster.groups.", "cluster.slurm.", "trackers.")  # what is asked of Slurm (not numbers of ranks and engines), and who is told


def run(words: list[str], run_dir: Path | None, wait: bool = False) -> int:
    """Start or resume a run; returns the exit code. On Slurm: submit it, and wait for its end if asked to."""
    console = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)
    folder, config = asked_for(words, run_dir)
    submitted = config.cluster.executor == "slurm"
    refuse_errors(config, console, folder)
    resuming = folder.run_yaml.exists()
    anew = False  # the model that an earlier start made is not this configuration's
    if resuming:
        old = load_config([folder.run_yaml])
        if has_results(folder):
            refuse_differences(old, config, folder)
            say_decay(old, config, console)
        elif changed := differences(old, config):
            console.print(f"nothing is done yet in {folder.path}, so it takes the new configuration ({_some(changed)})")
            anew = any(key == "seed" or key.startswith("model.") for key in changed)
        if finished(folder, config):
            console.print(f"{ending(folder, config, 'already finished')}; report: {build_report(folder.path)}")
            return OK
    else:
        refuse_foreign(folder.path)
    if submitted:
        refuse(config, folder, console)
    else:
        hold_port(bind_host(config.cluster.host), config.cluster.port).close()
    make(folder)
    with only_launcher(folder):
        if resuming:
            console.print(f"resuming {folder.path}")
        try:
            if submitted:
                refuse_in_use(folder)
            if anew and (made := folder.path / "model").is_dir():
                shutil.rmtree(made)
            write_run(folder, config)
            if not submitted:
                return follow(folder, config, console)
            ended = submit_run(folder, config, console)
        except Fenced as error:
            console.print(f"{error}, which goes on with the run; this one has stopped")
            return AGAIN
        except OSError as error:
            if (line := disk_full(error, folder.path)) is None:
                raise
            raise UserError(line) from error
    return ended() if wait else OK  # unlocked: the job is the launcher now


def render(words: list[str], folder: Path) -> int:
    """Write what `run` would write with folder as the run directory, and print the commands that submit it by hand."""
    console = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)
    run, config = asked_for(words, folder)
    if config.cluster.executor != "slurm":
        raise UserError(f"cluster.executor: {config.cluster.executor} submits nothing; compose with a cluster, such as clusters/h200, or start it with miles-submit run")
    refuse_errors(config, console, run)
    if run.run_yaml.exists() and has_results(run):
        refuse_differences(load_config([run.run_yaml]), config, run)
    elif not run.run_yaml.exists():
        refuse_foreign(run.path)
    refuse(config, run, console, need_slurm=False)
    make(run)
    with only_launcher(run):
        write_run(run, config)
        submissions = prepare(config, run)
        write(run, submissions)
    for line in by_hand(run, submissions):
        print(line)
    return OK


def make(folder: RunDir) -> None:
    """The run directory."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder.path}: can't be made ({error.strerror}); choose another --run-dir") from error


def write_run(folder: RunDir, config: RunConfig) -> None:
    """run.yaml and plan.json."""
    seal_bytes(folder.run_yaml, dump_config(config).encode())
    write_plan(folder, {"summary": dict(summary(config)), "guarantee": guarantee(config).name})


def asked_for(words: list[str], run_dir: Path | None) -> tuple[RunDir, RunConfig]:
    """The run directory and the configuration that was typed: a run directory's own, or a recipe's.

    A recipe that an existing run is extended with keeps the decay of the learning rate that the run began with, unless the words
    set it: the default follows from num_rollout, and would change the learning rates of steps already done.
    """
    if run_dir is None and (existing := existing_run(words)) is not None:
        return RunDir(existing[0].absolute()), with_absolute_paths(existing[1])
    config = configuration(words)
    folder = RunDir((run_dir or Path("runs") / config.name).absolute())
    if folder.run_yaml.exists() and has_results(folder):
        recorded = load_config([folder.run_yaml]).train.optimizer
        if recorded.lr_schedule != "constant":
            config = configuration(words, {DECAY: recorded.lr_decay_steps})
    return folder, with_absolute_paths(config)


def resume(run_dir: Path, words: list[str]) -> int:
    """Go on with a run; returns the exit code. UserError where there is none."""
    return run([str(require_run_dir(run_dir).path), *words], None)


def follow(folder: RunDir, config: RunConfig, console: Console) -> int:
    """Launch, show the progress, make the report; returns the exit code."""
    progress = Progress()
    refresher = Refresher(folder.path)

    def update(status: dict[str, Any]) -> None:
        progress.update(status)
        refresher.poke()

    final = None
    try:
        with tracked(folder, config, progress.say):
            code = launch(config, folder, update, progress.say)
        final = last_state(folder)
    finally:
        refresher.close()
        progress.close(final)
    try:
        console.print(f"report: {build_report(folder.path)}")
    except OSError as error:
        if code == OK or disk_full(error) is None:  # a run that failed on a full disk has said so
            raise
    if code == OK:
        console.print(ending(folder, config, "finished"))
    return code


def ending(folder: RunDir, config: RunConfig, word: str) -> str:
    """What is said of a run that ended well: where it lies, or how a run that stopped early goes on."""
    if config.last_step == config.total_steps:
        return f"{word}: {folder.path}"
    return f"stopped after step {config.last_step} of {config.total_steps} (debug.stop_after); go on with: miles-submit run {folder.quoted} debug.stop_after=null"


def last_state(folder: RunDir) -> dict[str, Any] | None:
    """What a run's files say at its end, as Progress shows it; None where no step is recorded."""
    summary = summarise(read_run(folder.path))
    if summary.step is None:
        return None
    names = ("run", "epoch", "step", "total_steps", "reward_mean", "accuracy", "tokens_per_second")
    return {name: getattr(summary, name) for name in names} | {"phase": summary.state}


def refuse_errors(config: RunConfig, console: Console, folder: RunDir) -> None:
    """Warnings are printed; the first error ends it."""
    found = findings(config, recorded_roots(folder))
    for finding in found:
        derived = finding.where == DECAY and folder.run_yaml.exists()  # run.yaml holds every default
        if finding.level == "warning" and not derived:
            console.print(f"warning: {finding}")
    errors = [finding for finding in found if finding.level == "error"]
    if errors:
        more = f" ({len(errors) - 1} more: miles-submit check)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}")


def refuse_foreign(path: Path) -> None:
    """A new run needs a folder of its own."""
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise UserError(f"{there}: is a file, so no run can live there; choose another --run-dir")
    # What a launcher left that was killed while it wrote run.yaml is nobody's.
    if there == path and any(not entry.match(f".run.yaml.*{TEMPORARY_SUFFIX}") and not _of_preflight(entry) for entry in path.iterdir()):
        raise UserError(f"{path}: not empty, and not a run; choose another --run-dir")


def _of_preflight(entry: Path) -> bool:
    """Whether it is what a preflight leaves in the directory of a run to come."""
    return entry.name == "slurm" and entry.is_dir() and all(each.name in ("preflight", "exclude.json") for each in entry.iterdir())


def refuse_differences(old: RunConfig, new: RunConfig, folder: RunDir) -> None:
    """A run goes on as what it is."""
    changed = differences(old, new)
    if changed == [DECAY]:
        before, after = old.train.optimizer.lr_decay_steps, new.train.optimizer.lr_decay_steps
        raise UserError(
            f"{DECAY}: {after} where the run has {before} would have given other learning rates to steps already done; leave it out "
            "(a run that is extended keeps its decay), or choose another --run-dir"
        )
    if changed:
        raise UserError(f"{folder.path}: holds a run with another configuration ({_some(changed)}); resume it with `miles-submit run {folder.quoted}`, or choose another --run-dir")


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted paths of settings that differ and make it another run."""
    free = MAY_CHANGE | ({DECAY} if new.train.optimizer.lr_schedule == "constant" else set())
    return [key for key in _differences(old.model_dump(), new.model_dump(), "") if key not in free and not key.startswith(FREE)]


def say_decay(old: RunConfig, new: RunConfig, console: Console) -> None:
    """More steps than the learning rate's decay was made for: they have its end."""
    optimizer = new.train.optimizer
    if new.num_rollout > old.num_rollout and optimizer.lr_schedule != "constant":
        console.print(f"the learning rate keeps its decay of {optimizer.lr_decay_steps} steps ({DECAY}), and stays at {optimizer.min_lr:g} after it")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (", …" if len(keys) > 4 else "")


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str) -> list[str]:
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}")
    return found
