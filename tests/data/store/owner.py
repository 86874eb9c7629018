"""The fence of a run's newest attempt, which may delete."""

from miles.data.store.epoch import Fence, new_epoch, newest_epoch
from miles.data.store.run_dir import RunDir


def owner(run_dir: RunDir, epoch: int = 1) -> Fence:
    """Of attempt `epoch` at least."""
    while newest_epoch(run_dir) < epoch:
        new_epoch(run_dir)
    return Fence(run_dir, newest_epoch(run_dir))
