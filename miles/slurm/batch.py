"""The batch script's process, on the first node of the first group: `python -m miles.slurm.batch RUN [GROUP]`.

Like the launcher of one machine it holds no state that matters: whatever it must know of earlier attempts is in the run's files.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from miles.slurm.signals import Signals


def say(line: str) -> None:
    """A line in the job's output. On a full disk it is lost; the exit code, which it must not cost, says the rest."""
    from miles.config.exits import disk_full

    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(line.split())}\n"
    try:
        os.write(sys.stdout.fileno(), text.encode(errors="replace"))  # unbuffered: nothing is left to be written at the end
    except OSError as error:
        if disk_full(error) is None:
            raise


def main(words: list[str]) -> int:
    """Entry point: RUN, and for placement jobs the name of the group."""
    signals = Signals()  # before the rest is imported: one may come at once
    from miles.config.compose import load_config
    from miles.config.exits import AGAIN, WRONG, UserError, disk_full
    from miles.config.placement import node_groups
    from miles.data.store.epoch import Fenced
    from miles.data.store.run_dir import RunDir
    from miles.slurm.job_here import JobHere
    from miles.slurm.own_jobs import note_here
    from miles.slurm.reported import reported
    from miles.slurm.srun import addresses
    from miles.slurm.step import own_address
    from miles.slurm.tracked import tracked
    from miles.slurm.trainer_job import TrainerJob

    run = RunDir(Path(words[0]))
    try:
        config, job = load_config([run.run_yaml]), JobHere.read()
        note_here(run, words[1:] or [group.name for group in node_groups(config)])
        if job.restarts:
            say(f"job {job.id} begins again on {', '.join(job.nodes)}: it was requeued {job.restarts} time{'s' if job.restarts > 1 else ''}")
        os.environ["MILES_ADDRESSES"] = json.dumps(addresses(reachable=config.cluster.placement == "jobs"))
        os.environ["MILES_HOST"] = own_address()
        if words[1:] == ["rollout"]:
            from miles.slurm.rollout_job import RolloutJob

            return RolloutJob(run, config, job, signals, say).start()
        with tracked(run, config, say), reported(run, signals, say) as poke:
            return TrainerJob(run, config, job, signals, say, poke).start()
    except Fenced as error:
        say(f"{error}, which goes on with the run; this job has stopped")
        return AGAIN
    except UserError as error:
        say(f"error: {error}")
        return WRONG
    except OSError as error:
        if (line := disk_full(error, run.path)) is None:
            raise
        say(f"error: {line}")
        return WRONG


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
