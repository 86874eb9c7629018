"""`miles-submit preflight`: a short job on a run's groups that tests the nodes; slow and broken ones are left out of later submissions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from miles.cli.inputs import configuration, existing_run, with_absolute_paths
from miles.config.exits import AGAIN, OK, WRONG, TryAgain, UserError
from miles.data.store.run_dir import RunDir
from miles.slurm import checks, records, site
from miles.slurm.preflight import job
from miles.slurm.preflight.verdict import BAD, NOT_CHECKED

STYLES = {"ok": "green", "slow": "yellow", "broken": "bold red", NOT_CHECKED: "dim"}


def preflight(words: list[str], run_dir: Path | None, minutes: int, exclude: bool, as_json: bool) -> int:
    """Submit, wait, print what each probe says of each node. Returns WRONG when a node is slow or broken, AGAIN when there is no result."""
    console = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)
    known = existing_run(words) if run_dir is None else None
    config = with_absolute_paths(known[1] if known else configuration(words))
    run = RunDir((known[0] if known else run_dir or Path("runs") / config.name).absolute())
    if config.cluster.executor != "slurm":
        raise UserError(f"cluster.executor: {config.cluster.executor} has no nodes to test; compose with a cluster, such as clusters/h200")
    errors = [finding for finding in checks.refused(config, run, site.ask()) if finding.level == "error" and finding.where != "--run-dir"]
    if errors:
        raise UserError(str(errors[0]))
    folder = job.new_folder(run)
    jobs = job.submit(config, folder, job.prepare(config, run, folder, minutes))
    console.print(f"submitted {', '.join(f'job {each}' for each in jobs)}: preflight of {config.name}, for at most {minutes} min; Ctrl-C cancels it")
    try:
        found = job.results(folder, jobs, console.print)
    except KeyboardInterrupt:
        job.cancel(jobs)
        raise
    except TryAgain as error:
        console.print(f"miles-submit: {error}")
        return AGAIN
    nodes: dict[str, Any] = {node: report for each in found for node, report in each["nodes"].items()}
    bad: dict[str, str] = {node: why for each in found for node, why in each["bad"].items()}
    listed = records.exclude_list(run, config) if bad and exclude else None
    if listed is not None:
        records.exclude_in(listed, {node: f"preflight: {why}" for node, why in bad.items()}, 0)
    if as_json:
        print(json.dumps({"ok": not bad, "jobs": jobs, "nodes": nodes, "bad": bad, "exclude_list": str(listed) if listed else None}, indent=1, ensure_ascii=False))
    else:
        show(nodes)
        for node, why in bad.items():
            print(f"{node}: {why}")
        print(f"left out of later submissions: {', '.join(sorted(bad))} ({listed})" if listed else f"{len(nodes)} nodes tested, {len(bad)} bad")
    return WRONG if bad else OK


def show(nodes: dict[str, Any]) -> None:
    """A line a probe and verdict; nodes of which the same is said share it."""
    console = Console(highlight=False, emoji=False, markup=False, soft_wrap=True)
    names = list(dict.fromkeys(name for report in nodes.values() for name in report["probes"]))
    wide = max(map(len, names))
    for name in names:
        said: dict[tuple[str, str], list[str]] = {}
        for node, report in nodes.items():
            if (each := report["probes"].get(name)) is not None:
                # Figures differ from node to node; a good one's are in --json and, for one node, here.
                key = (each["status"], each["detail"] if each["status"] in (*BAD, NOT_CHECKED) else "")
                said.setdefault(key, []).append(node)
        for (status, detail), where in said.items():
            text = detail or nodes[where[0]]["probes"][name]["detail"] + (f" ({where[0]})" if len(where) > 1 else "")
            which = "all nodes" if len(where) == len(nodes) > 1 else ", ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")
            console.print(f"{name:<{wide}}  {status:<11}  {which}: {text}", style=STYLES[status])
