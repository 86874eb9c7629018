"""The rollout service: hands out draws, judges rounds, composes manifests. It holds no tensors and drives nobody.

Its state is one integer, the next draw, and that is in the manifest of the last batch: a service that dies is started anew and
asked again. Routes and authentication are in service_http; this is what they call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from miles.config import placement
from miles.config.exits import AGAIN, OK, WRONG, TryAgain, UserError
from miles.config.schema import RunConfig
from miles.data.prompts import PromptSet
from miles.data.store.epoch import Fence, Fenced
from miles.data.store.events import Events
from miles.data.store.manifest import NAME as MANIFEST
from miles.data.store.manifest import Manifest, find_batch, read_manifest, seal_manifest, set_aside
from miles.data.store.run_dir import RunDir
from miles.rollout.compose import compose
from miles.rollout.draws import SOURCES, first_draw, number_in_source
from miles.rollout.guests import Guests, Stale
from miles.rollout.jobs import BatchJob, Finished, Job, Part, ShardReport
from miles.rollout.watchdog import Hang, Watchdog, beat_seconds

log = logging.getLogger(__name__)

BATCH_WAIT_SECONDS = 5.0
WORK_WAIT_SECONDS = 1.0
FAILED = 1  # a bug: files are kept, nothing is tried again
DUMP_SECONDS = 10.0  # for stacks to be written before a run that hangs is ended
SUPERVISED_AT_ONCE = 1024  # draws of a warm start cost the worker next to nothing


class Ended(Exception):
    """The attempt is over: `code` says how (OK, AGAIN, WRONG), `culprit` whose fault it is (role, rank, node), if that is known."""

    def __init__(self, code: int, message: str, culprit: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.culprit = code, message, culprit


class RolloutService:
    """State of the service in one attempt. All methods run in one event loop."""

    def __init__(self, config: RunConfig, run_dir: RunDir, epoch: int, prompts: dict[str, PromptSet], silence: float = 60.0) -> None:
        """silence: seconds without a word from a role that has a heartbeat, after which the attempt is given up."""
        self.config, self.run_dir, self.epoch, self.prompts, self.silence = config, run_dir, epoch, prompts, silence
        self.fence = Fence(run_dir, epoch)
        self.events = Events(run_dir, "service", 0, epoch)
        self.jobs: dict[tuple[str, int], BatchJob] = {}
        self.sealed: dict[tuple[str, int], tuple[Job, Manifest]] = {}
        self.peers: list[dict[str, Any]] = []
        self.values: dict[str, Any] = {}
        self.heard: dict[tuple[str, int], float] = {}
        self.told: set[int] = set()
        self.announced: dict[str, Any] = {}
        self.notices: list[str] = []  # lines that a person should read
        self.notices_told = 0
        self.stop = False
        self.end: Ended | None = None
        ranks = config.train.num_nodes * config.train.num_gpus_per_node
        self.watchdog = Watchdog(config.cluster.hang_seconds, beat_seconds(config.cluster.hang_seconds), ranks)
        self.hang: Hang | None = None
        self.dump_until = 0.0
        self._wake = asyncio.Event()
        self.places: dict[tuple[str, int], str] = {}
        self.guests = Guests(placement.part(config, "rollout").nodes) if config.cluster.placement == "jobs" and not config.debug.recorded else None
        self._asked: tuple[tuple[str, int], float] | None = None  # the batch that the trainer waits for, and since when

    # Waiting.

    def changed(self) -> None:
        """Wake everybody who waits."""
        self._wake.set()
        self._wake = asyncio.Event()

    async def until(self, ready: Callable[[], Any], seconds: float) -> Any:
        """The first true value of ready(), or its last value after so many seconds; Ended cuts it short."""
        deadline = time.monotonic() + seconds
        while not (value := ready()):
            self.check()
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                await asyncio.wait_for(self._wake.wait(), left)
            except TimeoutError:
                continue
        return value

    def check(self) -> None:
        """Raise Ended when the attempt is over."""
        if self.end is not None:
            raise self.end

    def finish(self, code: int, message: str, culprit: dict[str, Any] | None = None) -> None:
        """End the attempt for everybody; the first reason stays."""
        if self.end is None:
            self.end = Ended(code, message, culprit)
            if code != OK:
                log.error("%s", message)
        self.changed()

    # Processes.

    def register(self, role: str, rank: int, place: str = "", **facts: Any) -> int:
        """A process is here; a later word of the same process replaces the earlier one. place: its supervisor.

        Returns its rank: where workers come and go, one that takes another's place has a number of its own, and its files too.
        """
        if self.guests is not None and role == "worker":
            rank = self.guests.number(rank, place)
        if self.guests is not None and role == "engine":
            self.guests.synced.pop(facts["url"], None)  # an address that another engine had before
            self.peers = [peer for peer in self.peers if peer.get("url") != facts["url"]]
        self.peers = [peer for peer in self.peers if (peer["role"], peer["rank"]) != (role, rank)]
        self.peers.append({"role": role, "rank": rank, "place": place, **facts})
        self.changed()
        return rank

    def of_role(self, role: str, count: int, place: str | None = None) -> list[dict[str, Any]]:
        """Its processes (at one place, or all) by rank, once there are `count` of them; else none."""
        found = sorted((peer for peer in self.peers if peer["role"] == role and place in (None, peer["place"])), key=lambda peer: peer["rank"])
        return found if len(found) >= count else []

    def heartbeat(self, role: str, rank: int, place: str = "", progress: dict[str, Any] | None = None, dumped: bool = False) -> None:
        """Note a sign of life, and what a trainer rank does. Raises Stale for one that was given up."""
        self.turn_away(place)
        now = time.monotonic()
        self.heard[role, rank] = now
        self.places[role, rank] = place
        if progress is not None:
            self.watchdog.note(rank, self.node_of(role, rank), progress, now, dumped)

    def turn_away(self, place: str) -> None:
        """Raise Stale for a process of a place that was given up: others have its work."""
        if self.guests is not None and place in self.guests.lost:
            raise Stale(f"this rollout node ({place}) was given up: {self.guests.lost[place]}")

    def lose(self, place: str, why: str) -> None:
        """A rollout node is gone: its unfinished work goes to others, and who comes from there is turned away."""
        assert self.guests is not None, "elsewhere the attempt ends"
        worker = self.guests.lose(place, why)
        self.peers = [peer for peer in self.peers if peer["place"] != place]
        self.heard = {key: last for key, last in self.heard.items() if self.places.get(key) != place}
        if worker is not None:
            for batch in self.jobs.values():
                batch.lose(worker)
        line = f"rollout node {place} left ({why}); what it had not finished goes to others"
        log.warning("%s", line)
        self.notices.append(line)
        self.changed()

    def node_of(self, role: str, rank: int) -> str:
        """Name of the machine that a process is on, as it said."""
        return next((str(peer.get("node", "")) for peer in self.peers if (peer["role"], peer["rank"]) == (role, rank)), "")

    def watch(self) -> None:
        """End the attempt when a role has gone silent, or the trainer hangs; before that, all trainer ranks write down where they are."""
        now = time.monotonic()
        if self.guests is not None:
            for key, last in list(self.heard.items()):
                if key[0] != "trainer" and now - last > self.silence and self.places[key] not in self.guests.lost:
                    self.lose(self.places[key], f"{key[0]} {key[1]} was silent for {self.silence:g} s")
        if self.hang is None:
            self.hang = self.silent(now) or self.watchdog.hang(now)
            if self.hang is None:
                return
            self.dump_until = now + (DUMP_SECONDS if self.watchdog.ranks else 0.0)
        if now >= self.dump_until or self.watchdog.all_dumped(now):
            self.finish(AGAIN, self.hang.reason, self.hang.culprit)

    def silent(self, now: float) -> Hang | None:
        """The role that has a heartbeat and said nothing for too long."""
        for (role, rank), last in self.heard.items():
            if now - last > self.silence:
                node = self.node_of(role, rank)
                return Hang(role, rank, node, f"{role} {rank}{f' on node {node}' if node else ''} was silent for {self.silence:g} s")
        return None

    # Batches.

    async def batch(self, job: Job) -> Manifest | None:
        """The sealed batch of a job (made before, or now), or None after some seconds while it is being made. Raises Ended."""
        self.check()
        key = job.kind, job.step
        if (manifest := self._ready(job)) is not None:
            self._prefetch(job, manifest)
            return manifest
        batch = self.jobs.get(key)
        if batch is None or batch.job.lineage() != job.lineage() or (job.next_draw is not None and job.next_draw != batch.first):
            found = self._recorded(job)
            if found is not None:
                self.sealed[key] = job, found
                self._prefetch(job, found)
                return found
            self.jobs[key] = self._begin(job)
            self.changed()
        if self._asked is None or self._asked[0] != key:
            self._asked = key, time.monotonic()
        # Who waits for a batch hears of a stop at once; an evaluation goes on through it.
        await self.until(lambda: self._ready(job) or self.new_engines() or (self.stop and job.kind != "eval"), BATCH_WAIT_SECONDS)
        manifest = self._ready(job)
        if manifest is not None:
            self._asked = None
            self._prefetch(job, manifest)
        return manifest

    def _ready(self, job: Job) -> Manifest | None:
        made = self.sealed.get((job.kind, job.step))
        if made is None or made[0].lineage() != job.lineage():
            return None
        return made[1] if job.next_draw is None or _first(made[1]) == job.next_draw else None

    def _recorded(self, job: Job) -> Manifest | None:
        """The batch on disk, if it is of this lineage and of these draws; any other is set aside."""
        manifest = find_batch(self.run_dir, job.step, job.kind, job.weight_checksum, fence=self.fence)
        if manifest is None:
            return None
        first = self._first_draw(job)
        if manifest.draws and _first(manifest) != first:
            aside = set_aside(self.run_dir.batch_of(job.kind, job.step), str(manifest.epoch), self.fence)
            log.warning("step %d: the recorded %s batch begins with draw %d, not %d; set aside as %s", job.step, job.kind, _first(manifest), first, aside)
            return None
        return manifest

    def _rows(self, kind: str) -> int:
        prompts = self.prompts.get(SOURCES[kind])
        if prompts is None:
            raise UserError(f"{SOURCES[kind]}: no prompts, but a batch of kind {kind} was asked for; set {SOURCES[kind]}.prompt_data")
        return len(prompts)

    def _first_draw(self, job: Job) -> int:
        """Where the batch's draws begin: as asked, else after the batch before it."""
        if job.next_draw is not None:
            return job.next_draw
        if job.kind == "rollout" and job.step > self.config.warm_start.steps + 1:
            before = self.run_dir.batch(job.step - 1) / MANIFEST
            if not before.exists():
                raise UserError(f"{before}: missing, so the next draw is unknown; resume from an older checkpoint, or restore the file")
            return read_manifest(before).next_draw
        return first_draw(job.kind, job.step, self._needed(job.kind), self._rows(job.kind))

    def _needed(self, kind: str) -> int:
        """Groups of a batch."""
        if kind == "eval":
            return self._rows(kind)
        return self.config.warm_start.batch_size if kind == "sft" else self.config.rollout.batch_size

    def _begin(self, job: Job) -> BatchJob:
        config, needed = self.config.rollout, self._needed(job.kind)
        filtered = job.kind == "rollout" and config.filter_path is not None
        again = (config.over_sampling_batch_size or needed) if filtered else needed
        return BatchJob(job, self._first_draw(job), needed, again, self._rows(job.kind))

    def _prefetch(self, job: Job, manifest: Manifest) -> None:
        """Make the next warm-start batch while the trainer works on this one: it depends on no weights."""
        following = job.step + 1
        if job.kind != "sft" or following > self.config.warm_start.steps:
            return
        key = "sft", following
        if key in self.jobs or key in self.sealed or (self.run_dir.batch(following) / MANIFEST).exists():
            return
        self.jobs[key] = self._begin(Job("sft", following, parent_checkpoint=job.parent_checkpoint))
        self.changed()

    def _seal(self, key: tuple[str, int]) -> None:
        batch = self.jobs.pop(key)
        with self.events.phase("compose", batch.job.step, kind=batch.job.kind) as facts:
            manifest = compose(batch, self.config, self.run_dir.run_id(), self.epoch)
            seal_manifest(self.run_dir.batch_of(*key), manifest, self.fence)
            facts.update(sequences=manifest.sequences, tokens=manifest.tokens)
        self.sealed = {k: v for k, v in self.sealed.items() if k[1] >= key[1] - 2}
        self.sealed[key] = batch.job, manifest

    # Workers.

    async def work(self, report: dict[str, Any]) -> dict[str, Any]:
        """Take a worker's report, give it what to do next; waits a little when there is nothing. Raises Ended."""
        worker, place = int(report["worker"]), str(report.get("place", ""))
        self.heartbeat("worker", worker, place)
        try:
            self._take(worker, report)
            answer = await self.until(lambda: self._give(worker, place, int(report.get("idle", 0))), float(report.get("wait", WORK_WAIT_SECONDS)))
        except Ended as end:
            self.told.add(worker)
            if end.code != OK:
                raise
            return {"draws": [], "seal": [], "stop": True}
        return answer or {"draws": [], "seal": [], "stop": False}

    def _take(self, worker: int, report: dict[str, Any]) -> None:
        failed = report.get("failed")
        if failed and self.guests is not None and not failed["user_fault"] and failed.get("again", True):
            self.lose(str(report.get("place", "")), failed["message"])
            self.turn_away(str(report.get("place", "")))
        if failed:
            self.finish(WRONG if failed["user_fault"] else AGAIN if failed.get("again", True) else FAILED, failed["message"])
        self.check()
        for group in report.get("finished", ()):
            batch = self.jobs.get((group["kind"], group["step"]))
            if batch is not None:
                batch.finish(Finished(group["draw"], worker, group["samples"], group["tokens"], group["reward_mean"], group["dropped"]))
        for part in report.get("sealed", ()):
            key = part["job"]["kind"], part["job"]["step"]
            batch = self.jobs.get(key)
            if batch is not None and batch.job.lineage() == part["job"] and Part(*part["part"]) in batch.orders:
                batch.shards[Part(*part["part"])] = ShardReport(**part["shard"])
                if batch.complete:
                    self._seal(key)
        if report.get("finished") or report.get("sealed"):
            self.changed()

    def _give(self, worker: int, place: str, idle: int) -> dict[str, Any] | None:
        """Seal orders and draws for a worker with `idle` free places for samples; None when there is neither. Raises Stale as heartbeat()."""
        self.turn_away(place)  # it may have been given up while it waited here
        seals, draws = [], []
        for batch in list(self.jobs.values()):
            job, kind = batch.job.lineage(), batch.job.kind
            seals += [{"job": job, "part": list(part), "draws": order} for part, order in batch.orders_for(worker)]
            if kind != "sft" and self.guests is not None and not self.guests.ready(worker, self.peers, batch.job.weight_checksum):
                continue
            each = {"rollout": self.config.rollout.n_samples_per_prompt, "eval": self.config.eval.n_samples_per_prompt, "sft": 1}[kind]
            most = SUPERVISED_AT_ONCE if kind == "sft" else idle // each
            taken = batch.take(worker, min(most, batch.share(worker, self.workers())))
            if kind != "sft":
                idle -= len(taken) * each
            if taken:
                lost = sorted({before for draw in taken for before in batch.lost.get(draw, ())})
                draws.append({"job": job, "draws": [self._draw(kind, draw) for draw in taken], "lost": lost})
        return {"draws": draws, "seal": seals, "stop": False} if seals or draws else None

    def workers(self) -> int:
        """How many share the work: those that are planned, or, where they come and go, those that are here."""
        if self.guests is None:
            return placement.part(self.config, "rollout").nodes
        return max(1, sum(peer["role"] == "worker" for peer in self.peers))

    def new_engines(self) -> list[str]:
        """Addresses of engines that came late and don't hold the trainer's weights; none where all engines are there from the beginning."""
        if self.guests is None:
            return []
        return [peer["url"] for peer in self.peers if peer["role"] == "engine" and self.guests.synced.get(peer["url"]) != self.guests.checksum]

    def sync(self, checksum: str, engines: list[str], lost: list[str]) -> None:
        """The trainer's word: these engines hold the weights of this checksum, verified; those could not be reached."""
        assert self.guests is not None, "elsewhere all engines are the same"
        for peer in list(self.peers):
            if peer.get("url") in lost and peer["place"] not in self.guests.lost:
                self.lose(peer["place"], f"engine {peer['url']} could not be reached")
        self.guests.checksum = checksum
        self.guests.synced |= dict.fromkeys(engines, checksum)
        self.changed()

    def _draw(self, kind: str, draw: int) -> dict[str, Any]:
        prompts = self.prompts[SOURCES[kind]]
        return vars(prompts.draw(number_in_source(kind, draw, len(prompts)), draw))

    # What a person sees.

    def waiting_for(self) -> str | None:
        """What keeps the run from its next step, where processes are still getting ready; None once they are."""
        here = [peer["role"] for peer in self.peers]
        if self.guests is not None and self._asked and self._asked[0][0] != "sft" and "worker" not in here:
            return "a rollout node to come (none is here); training goes on when one does"
        engines = placement.engines(self.config) if self.guests is None else 0
        missing = engines - here.count("engine")
        starting = ("an engine" if engines == 1 else f"{missing} of {engines} engines") + " to start"
        if "trainer" not in here:
            return "the trainer to start (the first start on a machine compiles kernels)"
        if "model" not in self.values:
            return "the model to be built" if self.config.model.build else "the trainer to read the model's folder"
        if "step" not in self.announced:
            if self.sealed:
                return None  # its first batch is with it
            return "the trainer to load the model" + (f", and {starting}" if missing > 0 and not self.config.warm_start.steps else "")
        warm = self.announced.get("kind") == "sft" and self.announced["step"] >= self.config.warm_start.steps
        return starting if missing > 0 and warm and self.config.num_rollout and self.announced.get("phase") == "sft" else None

    def status(self) -> dict[str, Any]:
        """Everything that the progress display and `miles-submit status` show."""
        told: dict[str, Any] = {"run": self.config.name, "epoch": self.epoch, "total_steps": self.config.total_steps, "stop": self.stop}
        told |= {**self.announced, "notices": self.notices}
        self.notices_told = len(self.notices)
        batch = self.jobs.get(self._asked[0]) if self._asked else None
        if self.guests is not None and (waiting := self.waiting_for()):
            told["waiting"] = waiting
        if self._asked and batch is not None:
            progress = batch.progress()
            told |= {**progress, "phase": "generate"}
            if batch.job.kind != "sft":  # demonstrations are read, not generated
                told["tokens_per_second"] = progress["tokens"] / max(1e-3, time.monotonic() - self._asked[1])
        elif self.end is None and (waiting := self.waiting_for()):
            told["waiting"] = waiting
        if self.end is not None:
            told |= {"phase": "finished" if self.end.code == OK else "failed", "message": self.end.message}
        now = time.monotonic()
        told["roles"] = [{"role": role, "rank": rank, "silent_seconds": round(now - last, 1)} for (role, rank), last in sorted(self.heard.items())]
        return told


def as_end(error: BaseException) -> Ended | None:
    """How an exception ends the attempt; None for a bug."""
    if isinstance(error, Ended):
        return error
    if isinstance(error, UserError):
        return Ended(WRONG, str(error))
    if isinstance(error, TryAgain | Fenced):
        return Ended(AGAIN, str(error))
    return None


def _first(manifest: Manifest) -> int:
    """Lowest draw that a batch consumed."""
    return min([*manifest.draws, *(each.draw for each in manifest.dropped)])
