"""A loaded chunk's ratios into the simulation, and who was how far off at which steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from miles.analysis import exact
from miles.analysis.corrections import CLASS_COLUMNS, CLASSES, SEQUENCE_COLUMNS, WEIGHT_BINS
from miles.analysis.distinct import distinct
from miles.analysis.load import Loaded, numbers_of
from miles.analysis.simulation import PLACE_COLUMNS, Simulation
from miles.analysis.weights_pass import weigh

PLACES = ("train_rank", "engine")
STRETCHES = 64  # of steps, held apart: so that thousands of ranks over thousands of steps fit


class SimulationPass:
    """steps: all that are analysed, by which they are cut into stretches; the same on every rank."""

    def __init__(self, steps: Sequence[int]) -> None:
        each = max(1, math.ceil(len(steps) / STRETCHES))
        self._stretch = {step: (steps[place - place % each], steps[min(place - place % each + each, len(steps)) - 1]) for place, step in enumerate(steps)}

    def add(self, simulation: Simulation, loaded: Loaded) -> None:
        """Add a chunk."""
        columns = loaded.columns
        classes, weights = np.zeros((CLASSES, CLASS_COLUMNS)), np.zeros((WEIGHT_BINS, len(SEQUENCE_COLUMNS)))
        values = np.zeros((len(loaded.row), len(PLACE_COLUMNS)))
        weigh(
            columns["rollout_logprob"], columns["loss_mask"], columns["train_logprob"], loaded.shard_start, loaded.train_start, loaded.length,
            classes, weights, simulation.density, values,
        )  # fmt: skip
        exact.add(simulation.classes, classes)
        exact.add(simulation.weights, weights)
        chunk, stretch = loaded.chunk, self._stretch[loaded.chunk.step.step]
        (ranks, engines), slots = distinct(np.stack([chunk.record.rank[chunk.first : chunk.last], numbers_of(loaded, "engine")]))
        labels = [("train_rank", (rank, *stretch)) for rank in ranks] + [("engine", (loaded.rows.names["engine"][place], *stretch)) for place in engines]
        table = np.zeros((len(labels), len(PLACE_COLUMNS)))
        for slot in slots:
            np.add.at(table, slot, values)
        simulation.places.add(labels, table)
