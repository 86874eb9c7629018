"""miles-submit: one YAML, one command. Thin: every command is a function elsewhere."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from miles.config.exits import WRONG, UserError, disk_full, file_fault

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="miles-submit",
    epilog="Example: miles-submit run recipes/quickstart --run-dir runs/first train.optimizer.lr=3e-4",
    no_args_is_help=True,
    context_settings=HELP,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True, **HELP}
Json = Annotated[bool, typer.Option("--json", help="print JSON, for scripts")]
Words = Annotated[
    list[str] | None,
    typer.Argument(help="YAML files (or names below configs/), key=value overrides, public --flags", metavar="[RECIPE]... [KEY=VALUE]... [--FLAGS]"),
]
INTERRUPTED = 130  # as shells count a Ctrl-C
RunPath = Annotated[Path, typer.Argument(help="run directory, such as runs/quickstart", metavar="RUN_DIR")]


def _version(asked: bool) -> None:
    if asked:
        print(f"miles {importlib.metadata.version('miles')}")
        raise typer.Exit


@app.callback()
def miles(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and end")] = False) -> None:
    """Reinforcement-learning post-training of large language models under Slurm, or on this machine: one YAML, one command."""


@app.command(context_settings=FLAGS, epilog="Example: miles-submit check recipes/quickstart --n-samples-per-prompt 16")
def check(
    context: typer.Context,
    what: Words = None,
    as_json: Json = False,
) -> int:
    """Validate a configuration and say on one page what it means. Exit code 78 when something is wrong."""
    from miles.cli.check import check as run_check
    from miles.cli.inputs import configuration

    return run_check(configuration([*(what or []), *context.args]), as_json)


@app.command(context_settings=FLAGS, epilog="Example: miles-submit plan recipes/my_run clusters/h200 --script")
def plan(
    context: typer.Context,
    what: Words = None,
    run_dir: Annotated[Path | None, typer.Option(help="where the run will live; default runs/NAME")] = None,
    script: Annotated[bool, typer.Option("--script", help="print what sbatch would be given, too")] = False,
    as_json: Json = False,
) -> int:
    """What a run is given, what it costs, whether it fits in memory, and when it would start. Exit code 78 when something is wrong."""
    from miles.cli.plan import plan as show

    return show([*(what or []), *context.args], run_dir, script, as_json)


@app.command(context_settings=FLAGS, epilog="Example: miles-submit render runs/first recipes/my_run clusters/h200")
def render(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="the run directory", metavar="DIR")],
    what: Words = None,
) -> int:
    """Write everything that run would write to a run directory, submit nothing, and print the command that does."""
    from miles.cli.run import render as write

    return write([*(what or []), *context.args], folder)


@app.command(context_settings=FLAGS, epilog="Example: miles-submit run recipes/quickstart --run-dir runs/first; the same command resumes it")
def run(
    context: typer.Context,
    what: Annotated[list[str] | None, typer.Argument(help="YAML files, overrides and flags as for check; or a run directory to resume", metavar="[RECIPE]... [KEY=VALUE]... [--FLAGS]")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="where the run lives; default runs/NAME")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="on Slurm: follow the run to its end, and end with its exit code")] = False,
) -> int:
    """Run to the end, or resume: a run directory that exists goes on from its newest good checkpoint. On Slurm: submit it."""
    from miles.cli.run import run as run_it

    try:
        return run_it([*(what or []), *context.args], run_dir, wait)
    except KeyboardInterrupt:  # before the launcher listens to it, or after the run has ended
        return _complain("stopped", INTERRUPTED)


@app.command(context_settings=FLAGS, epilog="Example: miles-submit sweep recipes/my_run clusters/h200 train.optimizer.lr=1e-4,3e-4 seed=1,2 --max-parallel 2")
def sweep(
    context: typer.Context,
    what: Words = None,
    run_dir: Annotated[Path | None, typer.Option(help="folder of the runs' directories; default runs/NAME-sweep")] = None,
    max_parallel: Annotated[int | None, typer.Option(min=1, help="runs at a time; default: as many as Slurm starts")] = None,
    as_json: Json = False,
) -> int:
    """Submit a run for every combination of values: key=a,b,c. Its state: miles-submit status FOLDER."""
    from miles.cli.sweep import sweep as submit_all

    return submit_all([*(what or []), *context.args], run_dir, max_parallel, as_json)


@app.command(context_settings=HELP, epilog="Example: miles-submit status runs/quickstart --json")
def status(run_dir: RunPath, as_json: Json = False) -> int:
    """What a run is doing: step, phase, reward, speed, time left; or how it ended. Of a sweep: a line a run."""
    if (run_dir / "sweep.json").is_file():
        from miles.cli.sweep import status as show_all

        return show_all(run_dir, as_json)
    from miles.cli.status import status as show

    return show(run_dir, as_json)


@app.command(context_settings=HELP, epilog="Example: miles-submit logs -f runs/quickstart trainer")
def logs(
    run_dir: RunPath,
    component: Annotated[str | None, typer.Argument(help="service, trainer, engine or worker; default all")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="keep printing until the run ends")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="lines from the end of each log")] = 20,
) -> int:
    """Logs of the newest attempt."""
    from miles.cli.logs import logs as show

    return show(run_dir, component, follow, lines)


@app.command(context_settings=HELP, epilog="Example: miles-submit cancel runs/quickstart; later: miles-submit resume runs/quickstart")
def cancel(
    run_dir: RunPath,
    now: Annotated[bool, typer.Option("--now", help="end it at once: what is not saved yet is done again on resume")] = False,
) -> int:
    """Ask a run to save and end; it is not requeued. Of a sweep: every run that waits or runs."""
    if (run_dir / "sweep.json").is_file():
        from miles.cli.sweep import cancel as end_all

        return end_all(run_dir, now)
    from miles.cli.cancel import cancel as end

    return end(run_dir, now)


@app.command(context_settings=FLAGS, epilog="Example: miles-submit resume runs/quickstart cluster.groups.all.time=8:00:00")
def resume(
    context: typer.Context,
    run_dir: RunPath,
    what: Annotated[list[str] | None, typer.Argument(help="what may differ when a run goes on, as for run", metavar="[KEY=VALUE]... [--FLAGS]")] = None,
) -> int:
    """Go on with a run that has stopped, from its newest good checkpoint, without the nodes that failed. The same as `run RUN_DIR`."""
    from miles.cli.run import resume as go_on

    try:
        return go_on(run_dir, [*(what or []), *context.args])
    except KeyboardInterrupt:
        return _complain("stopped", INTERRUPTED)


@app.command(context_settings=FLAGS, epilog="Example: miles-submit attach runs/quickstart rollout --node 1; or with a command: -- nvidia-smi")
def attach(
    context: typer.Context,
    run_dir: RunPath,
    component: Annotated[str | None, typer.Argument(help="train or rollout; default train")] = None,
    node: Annotated[int, typer.Option(help="which of the component's nodes, from 0")] = 0,
    only_print: Annotated[bool, typer.Option("--print", help="print the command and do nothing")] = False,
) -> int:
    """Open a shell in a run's job, beside a component's processes; or run a command there, after --."""
    from miles.cli.attach import attach as enter

    return enter(run_dir, component, node, context.args, only_print)


@app.command(context_settings=FLAGS, epilog="Example: miles-submit preflight recipes/my_run clusters/h200 --run-dir /shared/runs/first")
def preflight(
    context: typer.Context,
    what: Words = None,
    run_dir: Annotated[Path | None, typer.Option(help="whose exclude list is written; default runs/NAME")] = None,
    minutes: Annotated[int, typer.Option(min=1, help="time limit of the job [minutes]")] = 15,
    exclude: Annotated[bool, typer.Option("--exclude/--no-exclude", help="leave slow and broken nodes out of later submissions")] = True,
    as_json: Json = False,
) -> int:
    """Test the nodes that a run would get, by a short job on them. Exit code 78 when one is slow or broken."""
    from miles.cli.preflight import preflight as test

    try:
        return test([*(what or []), *context.args], run_dir, minutes, exclude, as_json)
    except KeyboardInterrupt:
        return _complain("stopped; the preflight's job is cancelled", INTERRUPTED)


@app.command(context_settings=HELP, epilog="Example: miles-submit doctor runs/quickstart")
def doctor(run_dir: RunPath, as_json: Json = False) -> int:
    """What happened to a run that is dead: on which node, by which evidence, and what to do."""
    from miles.cli.doctor import doctor as look

    return look(run_dir, as_json)


@app.command(context_settings=HELP, epilog="Example: miles-submit report runs/quickstart")
def report(run_dir: RunPath, as_json: Json = False) -> int:
    """Make the report of a run, finished or not: one HTML page."""
    from miles.cli.report import report as make

    return make(run_dir, as_json)


@app.command(epilog="Example: miles-submit inspect runs/quickstart/batches/step_000012 --rows 3:5")
def inspect(
    path: Annotated[Path, typer.Argument(help="a run directory, or a batch, checkpoint or file in one", metavar="PATH")],
    rows: Annotated[str | None, typer.Option("--rows", help="show sequences (or lines) FIRST:LAST whole, counted from 0; LAST is not shown", metavar="FIRST:LAST")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="compare every file with its checksum; exit code 78 names the damaged ones")] = False,
    as_json: Json = False,
) -> int:
    """What a file or folder of a run holds: schema, sizes, lineage, summaries; single sequences; whether it is undamaged."""
    from miles.cli.inspect import inspect as show

    return show(path, rows, verify, as_json)


minicluster = typer.Typer(
    name="minicluster",
    no_args_is_help=True,
    context_settings=HELP,
    rich_markup_mode=None,
    epilog='Example: eval "$(miles-submit minicluster up)"; srun -p h200 -N2 hostname; miles-submit minicluster down',
)
app.add_typer(minicluster, help="A private Slurm on this machine, with several nodes and fake GPUs, to try things out.")
ClusterDir = Annotated[Path | None, typer.Option("--dir", help="where the cluster lives, a short path; default /tmp/miles-slurm-UID", metavar="DIR")]


@minicluster.command(context_settings=HELP, epilog="Example: miles-submit minicluster up --nodes train=2,infer=1,cpu=0 --accounting")
def up(
    folder: ClusterDir = None,
    version: Annotated[str | None, typer.Option(help="24.11 when make slurm-24 has unpacked it; default this machine's Slurm")] = None,
    accounting: Annotated[bool, typer.Option("--accounting", help="with a database, so that sacct and sacctmgr work")] = False,
    nodes: Annotated[str | None, typer.Option(help="numbers of nodes, GROUP=COUNT with commas; default train=4,infer=4,cpu=2")] = None,
    as_json: Json = False,
) -> int:
    """Start it in the background. Prints the line that your shell needs; what is there goes to stderr."""
    from miles.cli import minicluster as cluster

    return cluster.up(folder or cluster.default_dir(), version, accounting, nodes, as_json)


@minicluster.command(context_settings=HELP, epilog="Example: miles-submit minicluster down")
def down(folder: ClusterDir = None, as_json: Json = False) -> int:
    """End it: daemons, jobs and its directory."""
    from miles.cli import minicluster as cluster

    return cluster.down(folder or cluster.default_dir(), as_json)


@minicluster.command("status", context_settings=HELP, epilog="Example: miles-submit minicluster status --json")
def minicluster_status(folder: ClusterDir = None, as_json: Json = False) -> int:
    """What runs of it, and its nodes."""
    from miles.cli import minicluster as cluster

    return cluster.status(folder or cluster.default_dir(), as_json)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 78."""
    try:
        code = app(standalone_mode=False)
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        code = _complain(_line(error))
    sys.exit(code if isinstance(code, int) else 0)


def _line(error: Exception) -> str:
    """What a user should read of an error: theirs, the machine's, or typer's about the command line. A bug keeps its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if hasattr(error, "format_message"):
        return str(error.format_message())
    line = disk_full(error) or (file_fault(error) if isinstance(error, OSError) else None)
    if line is None:
        raise error
    return line


def _complain(line: str, code: int = WRONG) -> int:
    Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False).print(f"miles-submit: {' '.join(line.split())}")
    return code
