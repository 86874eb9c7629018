"""The training loop. Every trainer rank runs it (SPMD); rank 0 alone talks to the rollout service and tells the others."""

from __future__ import annotations

from miles.config.exits import TryAgain
from miles.run.coordinator import StopRequested
from miles.run.schedule import steps
from miles.run.state import Run


def loop(run: Run) -> None:
    """Generate, train, sync, evaluate, save: from the newest good checkpoint to the last step."""
    try:
        for step in steps(run.config, run.trained):
            if step.kind == "rollout" and not run.engines_ready:
                run.meet_engines()
                run.sync()
            if step.first_rollout:
                run.freeze_reference()
                if run.config.eval.interval and run.config.eval.before_train:
                    run.evaluate()

            batch = run.batch(step)
            run.train(step, batch)
            if step.kind == "rollout":
                run.sync()
            if step.evaluate:
                run.evaluate()
            run.record(step)
            if step.save:
                run.save()
    except StopRequested as stop:
        run.save(stop=True)
        raise TryAgain(f"stopped on request after step {run.trained}") from stop
    run.finish()
