"""The whole analysis of a run directory: each process its chunks, one state at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from miles.analysis.boundaries import add_boundaries
from miles.analysis.chunk_pass import ChunkPass, add_core
from miles.analysis.evidence_pass import EvidencePass
from miles.analysis.expert_pass import ExpertPass
from miles.analysis.load import loaded
from miles.analysis.ranks import Alone, Many
from miles.analysis.simulation_pass import SimulationPass
from miles.analysis.source import CHUNK, Chunk, chunks_of, find_steps, open_step
from miles.analysis.state import SEEN, State
from miles.config.exits import UserError


def analyze(
    path: Path, ranks: Alone | Many, first: int | None = None, last: int | None = None, core: bool = False, renamed: bool = False, routes: bool = True, chunk: int = CHUNK
) -> State:
    """Everything that the run's steps first to last (inclusive) say; whole on rank 0. UserError, on all ranks alike, for what can't be read.

    core: only the sums of the core pass. renamed: batches of several run ids are one run whose folder got another name.
    routes: whether those that are recorded are read, which are many times larger than all else.
    """
    state, wrong = State(), None
    try:
        _add_all(state, path, ranks, first, last, core, renamed, routes, chunk)
    except UserError as error:
        wrong = str(error)
    except FileNotFoundError as error:
        wrong = f"{error.filename}: missing"
    except BaseException:
        ranks.abort()  # the others would wait for this one for ever
        raise
    if (message := ranks.agree(wrong)) is not None:
        raise UserError(message)
    return ranks.merge(state)


def _add_all(state: State, path: Path, ranks: Alone | Many, first: int | None, last: int | None, core: bool, renamed: bool, routes: bool, size: int) -> None:
    trained, untrained = find_steps(path, first, last)
    if ranks.rank == 0:
        state.seen[SEEN.index("not_trained_on")] += len(untrained)
    whole, evidence, simulation, experts = ChunkPass(), EvidencePass(trained), SimulationPass(trained), ExpertPass()
    try:
        for each in loaded(_chunks(state, path, trained, ranks, renamed, size), core):
            if core:
                add_core(state, each)
                continue
            whole.add(state, each)
            add_boundaries(state, each)
            simulation.add(state.simulation, each)
            evidence.add(state.evidence, each)
            if routes:
                experts.add(state.experts, each)
    finally:
        experts.close()


def _chunks(state: State, path: Path, steps: list[int], ranks: Alone | Many, renamed: bool, size: int) -> Iterator[Chunk]:
    """This rank's chunks: every `size`-th of all. A step is closed once its last chunk was read."""
    count, run_id = 0, None
    for number in steps:
        step = open_step(path, number)
        if step.manifest.kind == "sft":  # nothing was sampled, so nothing can differ
            if ranks.rank == 0:
                state.seen[SEEN.index("other_batches")] += 1
            continue
        if run_id is None:
            run_id = step.manifest.run_id
        if step.manifest.run_id != run_id and not renamed:
            raise UserError(
                f"{step.folder}: is of the run {step.manifest.run_id}, and earlier steps are of {run_id}: files of two runs are mixed; --renamed where the folder got another name"
            )
        if ranks.rank == 0:
            state.seen[SEEN.index("steps")] += 1
        try:
            for chunk in chunks_of(step, size):
                if count % ranks.size == ranks.rank:
                    yield chunk
                count += 1
        finally:
            step.close()
