"""A trainer rank: joins the process group, builds or resumes the trainer, runs the loop."""

from __future__ import annotations

from miles.run.loop import loop
from miles.run.role import Role, main
from miles.run.state import Run


def train(role: Role) -> None:
    """Body of the role."""
    run = Run.start(role)
    try:
        loop(run)
    finally:
        run.close()


if __name__ == "__main__":
    main("trainer", train)
