"""The preflight on the login node: its folder, its batch scripts (one a job of the run), submission, and waiting for the results."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miles.config.compose import dump_config
from miles.config.exits import TryAgain, UserError
from miles.config.placement import NodeGroup, node_groups
from miles.config.schema import RunConfig
from miles.data.store.files import read_json, seal_bytes
from miles.data.store.run_dir import RunDir
from miles.slurm import records
from miles.slurm.all_or_none import AllOrNone
from miles.slurm.command import slurm_command
from miles.slurm.preflight.files import LOGIN, canary_write
from miles.slurm.script import script
from miles.slurm.states import JobState, job_state, watched
from miles.slurm.submission import Submission, batch_python, without

BATCH = "miles.slurm.preflight.batch"
LEAD_SECONDS = 30
POLL_SECONDS = 0.5
LATE_SECONDS = 15.0  # a shared file system may show the result later than the job's end


def new_folder(run: RunDir) -> Path:
    """RUN/slurm/preflight/NUMBER, made for one preflight alone: two at once share no file. UserError where it can't be made."""
    place = records.folder(run) / "preflight"
    try:
        place.mkdir(parents=True, exist_ok=True)
        number = max((int(each.name) for each in place.iterdir() if each.name.isdecimal()), default=0)
        while True:
            number += 1
            with contextlib.suppress(FileExistsError):  # another took it since
                (place / str(number)).mkdir()
                return place / str(number)
    except OSError as error:
        raise UserError(f"{place}: can't be made ({error.strerror}); choose another --run-dir") from error


def read_by_nodes(config: RunConfig) -> list[str]:
    """Files and folders that the run's nodes read, made absolute before; a model that the run builds itself isn't there yet."""
    model = [] if config.model.build else [config.model.hf_checkpoint]
    named = [*model, config.checkpoint.ref_load, config.checkpoint.load, config.debug.train_only, config.debug.rescore, *(part.prompt_data for part in (config.data, config.warm_start, config.eval))]
    paths = [re.sub(r"@\[[^\]]*\]$", "", text) for text in named if text]
    return list(dict.fromkeys(path for path in paths if Path(path).is_absolute()))


def prepare(config: RunConfig, run: RunDir, folder: Path, minutes: int) -> list[Submission]:
    """One job, or with placement jobs one a group: the run's groups, for so many minutes, without the nodes that are known as bad. folder: the preflight's own."""
    groups = [without(_for(group, minutes), records.left_out(run, config)) for group in node_groups(config)]
    apart = [[group] for group in groups] if config.cluster.placement == "jobs" else [groups]
    found = []
    for together in apart:
        names = tuple(group.name for group in together)
        command = [batch_python(config, together[0]), "-m", BATCH, str(folder), *([names[0]] if len(apart) > 1 else [])]
        job = config.cluster.slurm.model_copy(update={"job_name": f"preflight-{config.name}", "requeue": "none", "lead_seconds": LEAD_SECONDS})
        output = Path(str(folder).replace("%", "%%")) / "%j.log"
        found.append(Submission(f"preflight-{config.name}", names, script(job, config.name, together, command, output, device=config.cluster.device)))
    return found


def _for(group: NodeGroup, minutes: int) -> NodeGroup:
    return NodeGroup(group.name, group.nodes, group.gpus_per_node, group.components, group.ask.model_copy(update={"time": str(minutes)}))


def submit(config: RunConfig, folder: Path, submissions: list[Submission]) -> list[int]:
    """Submit all or none; returns the job ids. UserError: what Slurm refuses."""
    seal_bytes(folder / "run.yaml", dump_config(config).encode())
    canary_write(folder, LOGIN)
    with AllOrNone() as jobs:
        for each in submissions:
            path = folder / each.file
            seal_bytes(path, each.script.encode())
            jobs.sbatch(["sbatch", "--parsable", str(path)])
    return jobs.jobs


def cancel(jobs: list[int]) -> None:
    """End the jobs."""
    if jobs:
        slurm_command(["scancel", *map(str, jobs)], check=False)


def results(folder: Path, jobs: list[int], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Wait for the jobs; returns their results. TryAgain: a job ended without one. say: hears why they wait."""
    said, found = "", []
    states: list[JobState] = []
    for states in watched(lambda: [job_state(str(job)) for job in jobs], say, POLL_SECONDS):
        words = "; ".join(state.words for state in states if not state.over)
        if words and words != said:
            say(words)
            said = words
    for state in states:
        path = folder / f"result.{state.job_id}.json"
        until = time.monotonic() + LATE_SECONDS
        while not path.exists() and state.exit_code in (0, 75) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        if not path.exists():
            log = folder / f"{state.job_id}.log"
            lines = log.read_text(errors="replace").split("\n") if log.exists() else []
            last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
            raise TryAgain(f"the preflight's job {state.job_id} ended without a result ({state.state.lower()}{': ' + state.reason if state.reason else ''}); {log}: {last}")
        found.append(read_json(path))
    return found
