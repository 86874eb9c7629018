"""The job whose batch process this is: its id, the nodes of its groups, how often it was requeued."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from miles.config.exits import UserError
from miles.slurm.hostlist import expand


@dataclass(frozen=True)
class JobHere:
    """id: the leader's; groups: node names of each group."""

    id: int
    groups: tuple[tuple[str, ...], ...]
    restarts: int

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> JobHere:
        """From what Slurm set. UserError outside of a job."""
        env = os.environ if environment is None else environment
        if "SLURM_JOB_ID" not in env:
            raise UserError("miles.slurm.batch: this is no Slurm job; submit with `miles-submit run`, or `sbatch` what `miles-submit render` wrote")
        size = int(env.get("SLURM_HET_SIZE", "0"))
        lists = [env[f"SLURM_JOB_NODELIST_HET_GROUP_{group}"] for group in range(size)] if size else [env["SLURM_JOB_NODELIST"]]
        return cls(int(env["SLURM_JOB_ID"]), tuple(map(tuple, map(expand, lists))), int(env.get("SLURM_RESTART_COUNT", "0")))

    @property
    def nodes(self) -> tuple[str, ...]:
        """All node names, each once."""
        return tuple(dict.fromkeys(node for group in self.groups for node in group))

