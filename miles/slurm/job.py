"""The environment of a process that the heterogeneous executor started."""

from __future__ import annotations

import os

from submitit.core.job_environment import JobEnvironment
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.slurm.slurm import SlurmJobEnvironment


class HetSlurmJobEnvironment(SlurmJobEnvironment):
    """Slurm's variables, as in submitit's own: ranks count within the component, the job id is the leader's in every component."""

    @property
    def component(self) -> str:
        """The component that this process belongs to."""
        return os.environ["MILES_COMPONENT"]

    @property
    def het_group(self) -> int:
        """The component's group of nodes, from 0."""
        return int(os.environ["MILES_HET_GROUP"])

    def _handle_signals(self, paths: JobPaths, submission: DelayedSubmission) -> None:
        """A run's supervisors mind their signals themselves, and are never requeued from inside."""
        if "MILES_TERM_ASKS" not in os.environ:
            JobEnvironment._handle_signals(self, paths, submission)
