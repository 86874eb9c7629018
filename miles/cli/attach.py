"""`miles-submit attach`: a shell, or a command, beside the processes of a run's component."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from miles.config.compose import load_config
from miles.config.exits import OK, UserError
from miles.config.placement import components, node_groups, part
from miles.report.records import require_run_dir
from miles.slurm import records
from miles.slurm.command import clean_environment, slurm_command
from miles.slurm.own_jobs import alive

SHELL = ("bash", "-l")


def attach(run_dir: Path, component: str | None, node: int, command: list[str], only_print: bool) -> int:
    """Become a shell, or a command, beside a component's processes on one of its nodes; UserError where none runs."""
    run = require_run_dir(run_dir)
    config = load_config([run.run_yaml])
    name = component or components(config)[0]
    if name not in components(config):
        raise UserError(f"{name}: components of this run are {', '.join(components(config))}")
    place = part(config, name)
    if not 0 <= node < place.nodes:
        raise UserError(f"--node {node}: component {name} has {place.nodes} node{'s' if place.nodes > 1 else ''}, counted from 0")
    groups = [group.name for group in node_groups(config)]
    apart = config.cluster.placement == "jobs"
    of_group = {int(entry["job_id"]) for entry in records.submitted(run) if not apart or place.group in entry["groups"]}
    running = [state for state in alive(run) if state.state == "RUNNING" and int(state.job_id) in of_group]
    if not running:
        raise UserError(f"{run_dir}: no job of component {name} runs now; look at: miles-submit status {run.quoted}")
    group = 0 if apart else groups.index(place.group)
    which = [f"--het-group={group}"] if len(running[-1].components) > 1 else []
    nodes = slurm_command(["scontrol", "show", "hostnames", running[-1].components[group].nodes]).stdout.split()
    where = [f"--jobid={running[-1].job_id}", *which, f"--nodelist={nodes[place.first_node + node]}", "--nodes=1", "--ntasks=1", "--overlap", "--mem=0"]
    words = ["srun", *where, "--pty", *(command or SHELL)]
    if only_print:
        print(shlex.join(words))
        return OK
    os.execvpe(words[0], words, clean_environment())
