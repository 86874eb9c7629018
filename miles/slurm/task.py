"""submitit's process of a task (`python -m miles.slurm.task FOLDER`), started sooner.

It knows its environment, so it needn't look through all packages for plugins; and it leaves numpy, which submitit loads first for the
sake of pickled arrays, to the function, since only names and plain values are pickled here. Each of them took a fifth of the start.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.modules["numpy"] = None  # type: ignore[assignment]  # what submitit tries to import isn't there
    from submitit.core import plugins
    from submitit.core.submission import submitit_main

    del sys.modules["numpy"]
    from miles.slurm.environment import HetSlurmJobEnvironment

    plugins.get_job_environment = HetSlurmJobEnvironment  # submitit.JobEnvironment() asks here
    submitit_main()
