"""One batch in the making: which draws it asks for, which came back, which are in. A state machine without clock or network.

Draws are asked for in rounds. A round is judged only when all its groups are finished, and groups are accepted in draw order, so
the batch does not depend on who was fast. Kept groups beyond what the batch needs are dropped as "surplus", on record.

A worker that is lost is no loss to the batch: what it has not sealed is asked of others, who find its finished groups in its journal
and make the rest again, with the same seeds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, NamedTuple

from miles.config.exits import UserError

Kind = Literal["rollout", "sft", "eval"]


@dataclass(frozen=True)
class Job:
    """What the trainer asks for."""

    kind: Kind
    step: int
    weight_version: int = 0
    weight_checksum: str = ""
    next_draw: int | None = None
    parent_checkpoint: str | None = None  # that the attempt began from: for the record, no part of the lineage

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Job:
        """From a request; unknown keys are ignored. A warm start does not depend on weights, and only rollouts go on from a draw."""
        known = {name: fields[name] for name in cls.__dataclass_fields__ if fields.get(name) is not None}
        if known["kind"] == "sft":
            known |= {"weight_version": 0, "weight_checksum": ""}
        if known["kind"] != "rollout":
            known.pop("next_draw", None)
        return cls(**known)

    def lineage(self) -> dict[str, Any]:
        """What worker and journal know it by."""
        return {"kind": self.kind, "step": self.step, "weight_version": self.weight_version, "weight_checksum": self.weight_checksum}


class Part(NamedTuple):
    """What one worker seals of a batch: one shard, or several where it does a lost worker's share as well."""

    worker: int
    number: int

    @property
    def name(self) -> str:
        """In the names of its files: the worker's number, 0 or 0-1."""
        return f"{self.worker}-{self.number}" if self.number else str(self.worker)


@dataclass(frozen=True)
class Finished:
    """A worker's word about one group. `dropped`: why a filter does not want it."""

    draw: int
    worker: int
    samples: int
    tokens: int
    reward_mean: float | None
    dropped: str | None


@dataclass
class ShardReport:
    """A worker's sealed part: the manifest's entries, and per sequence (in the shard's order) draw, sample and length [tokens]."""

    shard: dict[str, Any]
    routes: dict[str, Any] | None
    draws: list[int]
    samples: list[int]
    lengths: list[int]
    engines: list[dict[str, Any]] = field(default_factory=list)
    tokenizer_hash: str = ""


class BatchJob:
    """A batch of `needed` groups from draw `first` on, asked for in rounds of `round_size` draws (later rounds: `again`).

    data_rows: rows of the source; a filter that drops all of them ends the run.
    """

    def __init__(self, job: Job, first: int, needed: int, again: int, data_rows: int) -> None:
        assert needed >= 1, "a batch has groups"
        assert again >= 1, "a round has draws"
        self.job = job
        self.first = first
        self.needed = needed
        self.again = again
        self.data_rows = data_rows
        self.next_draw = first
        self.pending: deque[int] = deque()
        self.handed: dict[int, int] = {}
        self.finished: dict[int, Finished] = {}
        self.chosen: list[int] = []  # the batch's draws, once a round has enough
        self.orders: dict[Part, list[int]] = {}
        self.given: set[Part] = set()
        self.shards: dict[Part, ShardReport] = {}
        self.lost: dict[int, set[int]] = {}  # draws that lost workers had, and those workers
        self._ask(max(needed, again))

    def _ask(self, count: int) -> None:
        self.pending.extend(range(self.next_draw, self.next_draw + count))
        self.next_draw += count

    def take(self, worker: int, most: int) -> list[int]:
        """Up to `most` draws for a worker, in order."""
        taken = [self.pending.popleft() for _ in range(min(most, len(self.pending)))]
        self.handed.update(dict.fromkeys(taken, worker))
        return taken

    def share(self, worker: int, workers: int) -> int:
        """How many more draws a worker may take so that it has no more than its even share of all that are not finished."""
        in_flight = [by for draw, by in self.handed.items() if draw not in self.finished]
        return max(0, -(-(len(self.pending) + len(in_flight)) // workers) - in_flight.count(worker))

    def finish(self, group: Finished) -> None:
        """Record a finished group; judges the round when it was the last. Raises UserError when a filter leaves nothing."""
        if self.handed.get(group.draw) != group.worker or group.draw in self.finished:
            return  # told already
        self.finished[group.draw] = group
        if len(self.finished) < self.next_draw - self.first:
            return
        kept = self.kept()
        if self.chosen or len(kept) >= self.needed:
            self.chosen = self.chosen or kept[: self.needed]
            self._order()
            return
        if not kept and len(self.finished) >= max(self.data_rows, 4 * self.needed):
            reasons = sorted({str(f.dropped) for f in self.finished.values()})
            raise UserError(
                f"rollout.filter_path: step {self.job.step}: the filter dropped all of {len(self.finished)} groups "
                f"({', '.join(reasons)[:200]}); loosen it, or take prompts of another difficulty"
            )
        self._ask(self.again)

    def kept(self) -> list[int]:
        """Draws that no filter dropped, ascending."""
        return sorted(draw for draw, group in self.finished.items() if group.dropped is None)

    def _order(self) -> None:
        """Who has a chosen draw that no shard has yet is to seal it; in a further part, if that worker was told to seal one already."""
        ordered = {draw for draws in self.orders.values() for draw in draws}
        for draw in self.chosen:
            if draw not in ordered:
                worker = self.finished[draw].worker
                part = next(part for number in count() if (part := Part(worker, number)) not in self.given)
                self.orders.setdefault(part, []).append(draw)

    def orders_for(self, worker: int) -> list[tuple[Part, list[int]]]:
        """The draws that a worker should seal, once."""
        found = [(part, draws) for part, draws in self.orders.items() if part.worker == worker and part not in self.given]
        self.given |= {part for part, _ in found}
        return found

    def lose(self, worker: int) -> None:
        """A worker is gone for ever: what it had and has not sealed is asked for again. What a filter dropped stays dropped."""
        for part in [part for part in self.orders if part.worker == worker and part not in self.shards]:
            del self.orders[part]
        sealed = {draw for draws in self.orders.values() for draw in draws}

        def still_wanted(draw: int) -> bool:
            if draw in self.finished and (self.finished[draw].dropped is not None or (self.chosen and draw not in self.chosen)):
                return False
            return draw not in sealed

        back = [draw for draw, by in self.handed.items() if by == worker and still_wanted(draw)]
        for draw in back:
            self.finished.pop(draw, None)
            del self.handed[draw]
            self.lost.setdefault(draw, set()).add(worker)
        self.pending = deque(sorted([*back, *self.pending]))

    @property
    def complete(self) -> bool:
        """Whether every part is sealed."""
        return bool(self.chosen) and sum(map(len, self.orders.values())) == len(self.chosen) and self.shards.keys() == self.orders.keys()

    def dropped(self) -> list[dict[str, Any]]:
        """{draw, why} of every consumed draw that is not in the batch."""
        return [{"draw": draw, "why": group.dropped or "surplus"} for draw, group in sorted(self.finished.items()) if draw not in self.chosen]

    def progress(self) -> dict[str, Any]:
        """For the display."""
        groups = list(self.finished.values())
        rewards = [group.reward_mean for group in groups if group.reward_mean is not None]
        return {
            "kind": self.job.kind,
            "step": self.job.step,
            "groups_done": len(groups),
            "groups_total": self.next_draw - self.first,
            "tokens": sum(group.tokens for group in groups),
            "reward_mean": sum(rewards) / len(rewards) if rewards else None,
        }
