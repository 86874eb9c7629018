"""The rollout worker: takes draws, makes groups, scores them, journals them, seals shards when told.

One loop talks to the service: it reports what finished since the last call and gets draws and seal orders in return. Groups run
as tasks beside it. A group is reported only when it is in the journal, so a worker that is killed loses nothing finished.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np

from miles.config.exits import TryAgain, UserError
from miles.config.schema import RunConfig
from miles.data.sample import Draw, Sample
from miles.data.store.epoch import Fence, Fenced
from miles.data.store.events import Events
from miles.data.store.files import Sealed
from miles.data.store.journal import read_group
from miles.data.store.run_dir import RunDir
from miles.data.store.shard import write_routes, write_shard
from miles.rollout.aside import Aside
from miles.rollout.engines import Engines
from miles.rollout.filters import reason_to_drop
from miles.rollout.generate import GenerateContext, generate, supervised
from miles.rollout.held import Held, HeldSamples, Lineage, Place, name_of
from miles.rollout.imports import load_function
from miles.rollout.jobs import Part
from miles.rollout.rewards import Scorer
from miles.rollout.threads import in_thread
from miles.rollout.tokenizer import Tokenizer

Call = Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]  # POST /work

GATHER_SECONDS = 0.004  # groups that finish together are reported together
BUSY_SECONDS = 0.5
IDLE_SECONDS = 1.0


class Worker:
    """One worker of one attempt. `call` posts to the service's /work; `engines` are this worker's, `count` of them."""

    def __init__(
        self, config: RunConfig, run_dir: RunDir, rank: int, epoch: int, call: Call, tokenizer: Tokenizer, engines: Engines, count: int
    ) -> None:  # fmt: skip
        rollout = config.rollout
        self.config, self.run_dir, self.rank, self.call, self.tokenizer = config, run_dir, rank, call, tokenizer
        self.fence = Fence(run_dir, epoch)
        self.events = Events(run_dir, "worker", rank, epoch)
        self.samples = {"rollout": rollout.n_samples_per_prompt, "eval": config.eval.n_samples_per_prompt, "sft": 1}
        self.held = Held(run_dir, rank, epoch, self.samples)
        self.capacity = rollout.max_concurrency * count
        self.generate = generate if rollout.generate_path is None else load_function(rollout.generate_path, "rollout.generate_path")
        self.filter = None if rollout.filter_path is None else load_function(rollout.filter_path, "rollout.filter_path")
        self.scorers: dict[str, Scorer] = {}
        self._engines = engines
        self._contexts: dict[tuple[str, int, str], GenerateContext] = {}
        self._recalled: dict[tuple[str, int, str], dict[int, Place]] = {}
        self._began: dict[tuple[str, int, str], float] = {}
        self._tokens: dict[tuple[str, int, str], int] = {}
        self._in_flight = 0  # samples of groups taken and not finished
        self._turn = asyncio.Lock()
        self._journal = asyncio.Lock()
        self._places = asyncio.Semaphore(self.capacity)
        self._tasks: set[asyncio.Task[None]] = set()
        self._finished: list[dict[str, Any]] = []
        self._sealed: list[dict[str, Any]] = []
        self._failure: BaseException | None = None
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Work until the service says stop. Raises UserError, TryAgain or Fenced as the attempt goes wrong."""
        try:
            if self.config.num_rollout > 0:
                self._scorer("rollout").warm()  # its processes start while the others do
            while True:
                answer = await self._report()
                if answer["stop"]:
                    return
                for part in answer["draws"]:
                    await self._start(part["job"], [Draw(**fields) for fields in part["draws"]], part["lost"])
                for order in answer["seal"]:
                    await self._seal(order["job"], Part(*order["part"]), order["draws"])
                await self._pause()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for scorer in self.scorers.values():
                await scorer.close()
            await self._engines.close()
            self.held.close()

    async def _report(self) -> dict[str, Any]:
        if self._failure is not None:
            await self._confess(self._failure)
            raise self._failure
        finished, self._finished = self._finished, []
        sealed, self._sealed = self._sealed, []
        # Half as much again waits here, so that the engines need not wait for the next call. With nothing under way a group may
        # start even where it is larger than the places there are.
        idle = max(self.capacity + self.capacity // 2 - self._in_flight, 0 if self._in_flight else max(self.samples.values()))
        wait = 0.0 if finished or sealed or self._tasks else IDLE_SECONDS
        return await self.call({"worker": self.rank, "finished": finished, "sealed": sealed, "idle": idle, "wait": wait})

    async def _confess(self, error: BaseException) -> None:
        """Tell the service why this worker ends, so that everybody ends for the same reason."""
        again = isinstance(error, TryAgain | Fenced)
        message = str(error) if again or isinstance(error, UserError) else f"worker {self.rank}: {type(error).__name__}: {error}"
        try:
            await self.call({"worker": self.rank, "failed": {"message": message, "user_fault": isinstance(error, UserError), "again": again}, "wait": 0})
        except (UserError, TryAgain, RuntimeError):
            return  # the echo of what we said; our own error goes on

    async def _pause(self) -> None:
        """Until there is something to report, or for half a second while groups are under way."""
        if not self._tasks or self._sealed or self._finished or self._failure:
            return
        try:
            await asyncio.wait_for(self._wake.wait(), BUSY_SECONDS)
            await asyncio.sleep(GATHER_SECONDS)
        except TimeoutError:
            pass
        self._wake.clear()

    # Groups.

    async def _start(self, job: Lineage, draws: list[Draw], lost: list[int]) -> None:
        """Begin these groups. lost: workers that had some of them before."""
        name = name_of(job)
        self._began.setdefault(name, time.time())
        if job["kind"] == "sft":
            await self._run_group(self._supervise(job, draws))
            return
        if name not in self._contexts:
            async with self._journal:
                await in_thread(self.held.begin, job)
            for old in [old for old in self._contexts if old[0] == name[0]]:
                del self._contexts[old], self._recalled[old]
            self._contexts[name] = self._context(job)
            self._recalled[name] = self.held.recall(job)
        if lost:
            self._recalled[name] |= await in_thread(self.held.recall_lost, job, lost)
        for draw in draws:
            self._in_flight += self.samples[job["kind"]]
            task = asyncio.create_task(self._run_group(self._group(job, draw)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run_group(self, work: Coroutine[Any, Any, None]) -> None:
        """Any failure of a group ends the worker, through the loop that tells the service."""
        try:
            await work
        except Exception as error:
            self._failure = self._failure or error
        self._wake.set()

    async def _supervise(self, job: Lineage, draws: list[Draw]) -> None:
        for draw in draws:
            group = [supervised(draw, self.config, self.tokenizer)]
            self.held.add(job, group, None, hold=True)
            self._done(job, group, None)

    async def _group(self, job: Lineage, draw: Draw) -> None:
        """Generate (or recall), score, filter, journal."""
        kind, aside = job["kind"], Aside(self.run_dir.attempt(self.fence.epoch))
        try:
            place = self._recalled[name_of(job)].pop(draw.draw, None)
            if place is not None:
                group = await in_thread(read_group, *place)
            else:
                group = await self._make(draw, self._contexts[name_of(job)], aside)
                await self._scorer(kind).score(draw, group)
            async with self._journal:  # one whole group with its routes in memory, and one thread in `held`
                with self._engines.budget.hold(aside.bytes):
                    await in_thread(aside.restore, group)
                    dropped = self._verdict(group) if kind == "rollout" else None
                    await in_thread(self.held.add, job, group, place, hold=dropped is None)
            self._done(job, group, dropped)
        finally:
            aside.close()
            self._in_flight -= self.samples[kind]

    async def _make(self, draw: Draw, context: GenerateContext, aside: Aside) -> list[Sample]:
        """All samples of a draw, as soon as there are places for them; draws start in the order they came."""
        count = self.samples[context.kind]
        places = min(count, self.capacity)
        async with self._turn:
            for _ in range(places):
                await self._places.acquire()
        siblings = [asyncio.create_task(self._finish(draw, index, context, aside)) for index in range(count)]
        try:
            return list(await asyncio.gather(*siblings))
        finally:
            for task in siblings:
                task.cancel()  # when one fails, nobody waits for the others
            await asyncio.gather(*siblings, return_exceptions=True)
            for _ in range(places):
                self._places.release()

    async def _finish(self, draw: Draw, index: int, context: GenerateContext, aside: Aside) -> Sample:
        """A sample, its routes put aside until its siblings are there."""
        sample = await self._sample(draw, index, context)
        if sample.routes is not None:
            with self._engines.budget.hold(sample.routes.nbytes):  # a slow disk holds the engines up, not the memory
                await in_thread(aside.put, sample)
        return sample

    async def _sample(self, draw: Draw, index: int, context: GenerateContext) -> Sample:
        if self.generate is generate:
            return await generate(draw, index, context)
        where = f"generate {self.config.rollout.generate_path}, draw {draw.draw}"
        try:
            sample = await self.generate(draw, index, context)
        except Exception as error:
            if type(error).__module__.startswith("miles."):
                raise  # ours: an engine away, a prompt too long
            raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:500]}") from error
        if not isinstance(sample, Sample) or (sample.draw, sample.sample) != (draw.draw, index):
            raise UserError(f"{where}: returned {str(sample)[:60]!r}; a Sample with this draw and sample {index} is expected")
        return sample

    def _done(self, job: Lineage, group: list[Sample], dropped: str | None) -> None:
        """Report it with the next call."""
        rewards = [sample.reward for sample in group]
        tokens = sum(sample.response_length for sample in group)
        name = name_of(job)
        self._tokens[name] = self._tokens.get(name, 0) + tokens
        self._finished.append(
            {
                "kind": job["kind"],
                "step": job["step"],
                "draw": group[0].draw,
                "samples": len(group),
                "tokens": tokens,
                "reward_mean": None if job["kind"] == "sft" else float(np.mean(rewards)),
                "dropped": dropped,
            }
        )

    def _verdict(self, group: list[Sample]) -> str | None:
        if self.filter is None:
            return None
        try:
            return reason_to_drop(self.filter, group)
        except Exception as error:  # whatever a user's function raises
            where = f"rollout.filter_path {self.config.rollout.filter_path}, draw {group[0].draw}"
            raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:500]}") from error

    def _scorer(self, kind: str) -> Scorer:
        section = "eval.reward" if kind == "eval" and self.config.eval.reward not in (None, self.config.rollout.reward) else "rollout.reward"
        if section not in self.scorers:
            options = self.config.eval.reward if section == "eval.reward" else self.config.rollout.reward
            assert options is not None, "resolved"
            self.scorers[section] = Scorer(options, self.config, section)
        return self.scorers[section]

    def _context(self, job: Lineage) -> GenerateContext:
        sampling = self.config.eval.sampling if job["kind"] == "eval" else self.config.rollout.sampling
        shape, dtype = route_layout(self.tokenizer.folder) if self.config.rollout.return_routed_experts else (None, np.uint8)
        return GenerateContext(self.config, job["kind"], sampling, self.tokenizer, self._engines, job["weight_version"], shape, dtype)

    # Shards.

    async def _seal(self, job: Lineage, part: Part, draws: list[int]) -> None:
        """Seal the ordered draws, in (draw, sample) order, and tell it with the next report."""
        began = time.time()
        async with self._journal:
            samples = self.held.take(job, sorted(draws))
        shard, routes, rows = await in_thread(self._write, job, part, samples)
        described = [] if job["kind"] == "sft" else await self._engines.describe()
        entry = {"sequences": len(rows), "tokens": sum(length for _, _, length in rows)}
        self._sealed.append(
            {
                "job": job,
                "part": list(part),
                "shard": {
                    "shard": {**vars(shard), **entry},
                    "routes": None if routes is None else {**vars(routes), **entry},
                    "draws": [draw for draw, _, _ in rows],
                    "samples": [sample for _, sample, _ in rows],
                    "lengths": [length for _, _, length in rows],
                    "engines": described,
                    "tokenizer_hash": self.tokenizer.hash,
                },
            }
        )
        start, tokens = self._began.pop(name_of(job), began), self._tokens.pop(name_of(job), 0)
        self.events.append("generate", job["step"], start, began, kind=job["kind"], tokens=tokens)
        self.events.append("seal", job["step"], began, time.time(), kind=job["kind"], bytes=shard.bytes)

    def _write(self, job: Lineage, part: Part, samples: HeldSamples) -> tuple[Sealed, Sealed | None, list[tuple[int, int, int]]]:
        """(shard, routes if there are any, (draw, sample, length [tokens]) of each row)."""
        folder = self.run_dir.batch_of(job["kind"], job["step"])
        attrs = {"worker": self.rank, "epoch": self.fence.epoch, "kind": job["kind"], "step": job["step"]}
        shard = write_shard(folder / f"rollout.{part.name}.h5", samples, attrs, self.fence, samples.rows)
        routes = None
        if job["kind"] != "sft":
            routes = write_routes(folder / f"routes.{part.name}.h5", samples, attrs, self.fence, samples.rows)
        return shard, routes, sorted((row["draw"], row["sample"], row["length"]) for row in samples.rows)


def route_layout(folder: Path) -> tuple[tuple[int, int], Any]:
    """((layers, experts per token), dtype of an expert's number) by the model's config.json. Raises UserError for a dense model."""
    config = json.loads((folder / "config.json").read_text())
    experts = config.get("num_experts") or config.get("n_routed_experts") or config.get("num_local_experts")
    if not experts:
        raise UserError("rollout.return_routed_experts: the model has no experts; set it to false")
    return (config["num_hidden_layers"], config["num_experts_per_tok"]), np.uint8 if experts <= 256 else np.uint16
