"""Which attempts left something that a run goes on from: what they computed is in its bits."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from miles.data.store.checkpoint import STATE
from miles.data.store.files import Damaged, read_json
from miles.data.store.manifest import NAME
from miles.data.store.run_dir import COMPLETE, RunDir, journal_paths, steps_in


def last_with_results(run_dir: RunDir, epochs: Collection[int]) -> int | None:
    """The last of these attempts that left a complete checkpoint, a sealed batch or evaluation, or finished groups; None where none did."""
    last = None
    for epoch in _left_by(run_dir):
        if epoch in epochs and (last is None or epoch > last):
            last = epoch
            if last == max(epochs):
                break  # the usual case, told by a journal or the newest checkpoint
    return last


def has_results(run_dir: RunDir) -> bool:
    """Whether anything is there that a run could go on from, or that tells of a step: a line of metrics, a complete checkpoint, a
    sealed batch or evaluation, finished groups. What is damaged counts: somebody may restore it."""
    if run_dir.metrics.is_file() and run_dir.metrics.stat().st_size:
        return True
    if any((run_dir.checkpoint(step) / COMPLETE).exists() for step in steps_in(run_dir.checkpoints)):
        return True
    if any((folder / NAME).exists() for parent in (run_dir.batches, run_dir.evals) if parent.is_dir() for folder in parent.iterdir()):  # set aside ones too
        return True
    return any(path.stat().st_size for path in journal_paths(run_dir.journal))


def _left_by(run_dir: RunDir) -> Iterator[int]:
    """The epoch that each of them names, newest steps first. What is damaged names none: nothing goes on from it."""
    for path in journal_paths(run_dir.journal):
        if path.stat().st_size:
            yield int(path.name.split(".")[-2])
    sealed = [run_dir.checkpoint(step) / STATE for step in reversed(steps_in(run_dir.checkpoints)) if (run_dir.checkpoint(step) / COMPLETE).is_file()]
    sealed += [run_dir.batch(step) / NAME for step in reversed(steps_in(run_dir.batches))]
    sealed += [run_dir.eval(step) / NAME for step in reversed(steps_in(run_dir.evals))]
    for path in sealed:
        try:
            epoch = read_json(path).get("epoch")
        except (FileNotFoundError, AttributeError, Damaged):  # not sealed yet, or no object
            continue
        if isinstance(epoch, int):
            yield epoch
