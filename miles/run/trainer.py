"""A trainer rank: joins the process group, builds or resumes the trainer, runs the loop."""

from __future__ import annotations

from miles.run.loop import loop
from miles.run.modes import Rescore, mode, rescore
from miles.run.role import Role, load_run, main


def train(role: Role) -> None:
    """Body of the role."""
    run = mode(load_run(role.run_dir)).start(role)
    try:
        if isinstance(run, Rescore):
            rescore(run)
        else:
            loop(run)
    finally:
        run.close()


if __name__ == "__main__":
    main("trainer", train)
