"""`miles-submit minicluster`: a private Slurm on this machine, with fake GPUs, to try things out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles.config.exits import OK, UserError
from miles.slurm.minicluster import Cluster
from miles.slurm.minicluster.command_env import command_env, export_line
from miles.slurm.minicluster.ending import attach, end
from miles.slurm.minicluster.folder import ClusterError, recorded

FAILED = 1
FIRST_RUN = "miles-submit run recipes/tiny clusters/minicluster --wait"


def default_dir() -> Path:
    """One cluster a user, in a folder with a short path."""
    return Path(f"/tmp/miles-slurm-{os.getuid()}")


def counts(text: str | None) -> Mapping[str, int]:
    """`train=2,infer=1` as {group: nodes}. UserError for anything else."""
    found = {}
    for part in filter(None, (text or "").split(",")):
        name, _, count = part.partition("=")
        if not count.isdecimal():
            raise UserError(f"--nodes {text}: {part!r} is no GROUP=COUNT; for instance train=2,infer=1,cpu=0")
        found[name.strip()] = int(count)
    return found


def up(folder: Path, version: str | None, accounting: bool, nodes: str | None, as_json: bool) -> int:
    """Start a cluster that stays until `down`. The line for the shell goes to stdout, what is there to stderr, so that `eval` can take it."""
    try:
        Cluster(folder, version, accounting, counts(nodes)).up()
    except ClusterError as error:
        print(f"miles-submit: the private Slurm did not start: {error}", file=sys.stderr)
        return FAILED
    state = state_of(folder)
    if as_json:
        print(json.dumps(state))
        return OK
    print(state["export"], flush=True)
    _sinfo(folder.absolute(), state)
    if {"train0", "infer0"} <= set(state["nodes"]):
        print(f"after the export above: {FIRST_RUN}", file=sys.stderr)
    print(f"up until: miles-submit minicluster down{_option(folder)}", file=sys.stderr)
    return OK


def down(folder: Path, as_json: bool) -> int:
    """End a cluster: every process of it, and its folder. UserError when there is none."""
    found = attach(folder.absolute())
    end(folder.absolute(), bool(found["keep"]))
    print(json.dumps({"dir": str(folder.absolute()), "up": False}) if as_json else f"{folder}: down, nothing is left")
    return OK


def status(folder: Path, as_json: bool) -> int:
    """What runs. UserError when there is no cluster."""
    state = state_of(folder)
    if as_json:
        print(json.dumps(state))
        return OK
    print(f"Slurm {state['version']} in {state['dir']}, {'with' if state['accounting'] else 'without'} accounting")
    print(f"up: {', '.join(state['daemons']) or 'nothing'}")
    if missing := state["missing"]:
        print(f"not up: {', '.join(missing)}")
    print(state["export"], flush=True)
    if "slurmctld" in state["daemons"]:
        _sinfo(folder.absolute(), state)
    return OK


def state_of(folder: Path) -> dict[str, Any]:
    """{dir, version, accounting, export, env, nodes, daemons: {name: pid}, missing: [name]}."""
    folder = folder.absolute()
    found = attach(folder)
    daemons = {name: process.pid for name, process in recorded(folder).items()}
    wanted = ["keeper", "munged", *(["mariadbd", "slurmdbd"] if found["accounting"] else []), "slurmctld", *(f"slurmd-{node}" for node in found["nodes"])]
    conf, commands = folder / "conf" / "slurm.conf", Path(found["commands"]) if found["commands"] else None
    return {
        "dir": str(folder),
        "version": found["version"],
        "accounting": found["accounting"],
        "export": export_line(conf, commands),
        "env": {"SLURM_CONF": str(conf)} | ({"PATH": command_env(conf, commands)["PATH"]} if commands else {}),
        "nodes": found["nodes"],
        "daemons": daemons,
        "missing": [name for name in wanted if name not in daemons],
    }


def _sinfo(folder: Path, state: dict[str, Any]) -> None:
    words = ["sinfo", "-o", "%12P %10T %24N %16G %f"]
    subprocess.run(words, env=os.environ | command_env(folder / "conf" / "slurm.conf", None) | state["env"], stdout=sys.stderr, check=False)


def _option(folder: Path) -> str:
    return "" if folder == default_dir() else f" --dir {folder}"
