"""What the loop acts on: one trainer rank's run, with the verbs of the loop. Rank 0 talks to the service, all ranks train."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from miles.config.address import bind_host
from miles.config.exits import UserError, disk_full
from miles.config.placement import engines
from miles.config.schema import Checkpoint, RunConfig
from miles.data.store.epoch import Fence
from miles.data.store.events import Events
from miles.data.store.manifest import Manifest, read_manifest
from miles.data.store.metrics import Metrics, read_metrics
from miles.data.store.retention import Bounds, retire_batches
from miles.data.store.run_dir import RunDir, step_of
from miles.data.store.shard import open_shard
from miles.rollout.evaluate import summarise_sequences
from miles.rollout.imports import load_function
from miles.rollout.watchdog import beat_seconds
from miles.run.coordinator import Coordinator, NewEngines, StopRequested
from miles.run.role import Role, load_run
from miles.run.schedule import Step
from miles.sync.disk import DiskTransport
from miles.sync.tensor import TensorTransport
from miles.training.checkpoint import newest_good, verify_checkpoint
from miles.training.distributed import Ranks, open_store, start_ranks, stop_ranks
from miles.training.fsdp import FsdpTrainer
from miles.training.profile import profiled
from miles.training.progress import HERE


class Run:
    """One rank's run between two steps: `trained` steps are behind it, `next_draw` is the first prompt draw not handed out."""

    def __init__(self, role: Role, config: RunConfig, service: Coordinator, ranks: Ranks, trainer: FsdpTrainer) -> None:
        self.role, self.config, self.service, self.ranks, self.trainer = role, config, service, ranks, trainer
        self.folder = RunDir(role.run_dir)
        self.fence = Fence(self.folder, role.epoch)
        self.told = Metrics(self.folder.metrics, self.fence)
        self.events = Events(self.folder, "trainer", role.rank, role.epoch)
        self.trained = 0
        self.next_draw = 0
        self.saved: int | None = None
        self.parent: str | None = None  # the checkpoint that this attempt began from
        self.checksum = ""
        self.engines: list[str] = []
        self.guests = config.cluster.placement == "jobs" and not config.debug.recorded  # engines come and go
        self.met = False
        self.metrics: dict[str, float] = {}

    @classmethod
    def start(cls, role: Role) -> Run:
        """Join the other ranks, build the model if the recipe makes it on the spot, load the newest good checkpoint."""
        config = load_run(role.run_dir)
        service = Coordinator(role)
        service.register(pid=os.getpid())
        service.keep_alive(beat_seconds(config.cluster.hang_seconds), HERE)
        host, store = bind_host(config.cluster.host), None
        if role.world_size > 1:
            if role.rank == 0:
                store = open_store(host, 0, role.world_size, master=True)
                service.publish("store", {"host": host, "port": store.port})
            else:
                store = open_store(**service.lookup("store"), world_size=role.world_size, master=False)
        ranks = start_ranks(
            role.rank, role.world_size, ranks_per_node=config.train.num_gpus_per_node, device=config.cluster.device,
            store=store, threads=config.cluster.threads, seed=config.seed,
        )  # fmt: skip
        if role.rank == 0:
            service.publish("model", str(model_folder(config, Fence(RunDir(role.run_dir), role.epoch))))
        model = Path(service.lookup("model"))
        run = cls(role, config, service, ranks, FsdpTrainer(config, model, ranks))
        run.resume()
        return run

    def resume(self) -> None:
        """Go back to the newest good checkpoint; say which were passed over."""
        found, said = newest_good(self.folder.checkpoints) if self.role.rank == 0 else (None, [])
        for line in said:
            print(f"trainer: {line}", file=sys.stderr, flush=True)
        if said and found is None:
            raise UserError(
                f"{self.folder.checkpoints}: no good checkpoint ({said[0].removeprefix('checkpoint passed over: ')}); "
                "restore the files, or remove the folder to begin the run again"
            )
        if said:
            self.service.announce(notices=[f"{line}; the run goes on from {found.name if found else 'its start'}" for line in said])
        if self.role.rank == 0:
            self.service.publish("resumed", step_of(found.name) if found else None)
        folder = self.ranks.broadcast_json(str(found) if found else None)
        if folder is None:
            if self.role.rank == 0:
                self.told.cut_back(-1)
            self.begin()
            return
        self.parent = Path(folder).name
        progress = self.trainer.load(Path(folder))
        self.trained, self.next_draw, self.checksum = progress["trained"], progress["next_draw"], progress["checksum"]
        self.saved = self.trained
        if self.role.rank == 0:
            self.told.cut_back(self.trained)
            print(f"trainer: resumed after step {self.trained} from {folder}", flush=True)

    def begin(self) -> None:
        """The weights that a run starts from: the model's, or those of the checkpoint that is named."""
        named = self.config.checkpoint.load
        if named is None:
            return
        if self.role.rank == 0:
            verify_checkpoint(Path(named))
        self.ranks.barrier()
        self.trainer.load_weights(Path(named))

    @contextmanager
    def phase(self, name: str, number: int) -> Iterator[dict[str, Any]]:
        """Time a phase of a step for the timeline, and tell the watchdog."""
        with HERE.doing(name, number), self.events.phase(name, number) as facts:
            yield facts

    # --- the verbs of the loop -----------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number of the present weights: updates so far."""
        return self.trained

    @property
    def engines_ready(self) -> bool:
        """Whether this attempt's engines are known."""
        return self.met

    def meet_engines(self) -> None:
        """Wait for the engines of this attempt; where they come and go, for nobody."""
        self.met = True
        if not self.guests:
            peers = self.service.peers("engine", engines(self.config)) if self.role.rank == 0 else []
            self.engines = self.ranks.broadcast_json([peer["url"] for peer in peers])

    def freeze_reference(self) -> None:
        """The reference of the KL loss: the folder that the configuration names, else the weights before the first rollout."""
        if not self.config.algorithm.use_kl_loss:
            return
        named = self.config.checkpoint.ref_load
        folder = Path(named) if named else self.folder.path / "reference"
        if not named:  # also when an earlier attempt came this far: the weights are the same, or it was another run
            self.trainer.export_hf(folder, self.fence)
        self.trainer.load_reference(folder)

    def batch(self, step: Step) -> Path:
        """Folder of the sealed batch of a step; raises StopRequested on every rank together."""
        with self.phase("wait", step.number):
            return self.sealed(lambda: self.ask(step))

    def sealed(self, ask: Callable[[], Path]) -> Path:
        """The folder that rank 0 gets by asking, on every rank; engines that come meanwhile get the present weights. Raises StopRequested on all."""
        while True:
            answer: dict[str, Any] = {}
            if self.role.rank == 0:
                try:
                    answer = {"folder": str(ask())}
                except StopRequested:
                    answer = {"stop": True}
                except NewEngines as new:
                    answer = {"engines": new.urls}
            answer = self.ranks.broadcast_json(answer)
            if "stop" in answer:
                raise StopRequested
            if "folder" in answer:
                return Path(answer["folder"])
            self.push(answer["engines"])

    def ask(self, step: Step) -> Path:
        """Rank 0's part of batch: the folder, once it is sealed."""
        return Path(self.service.batch(self.job(step.kind, step.number))).parent

    def job(self, kind: str, number: int) -> dict[str, Any]:
        """What is asked of the service: this kind of batch, by these weights."""
        return {
            "kind": kind, "step": number, "weight_version": self.version, "weight_checksum": "" if kind == "sft" else self.checksum,
            "next_draw": self.next_draw, "parent_checkpoint": self.parent,
        }  # fmt: skip

    def train(self, step: Step, folder: Path) -> None:
        """All optimizer steps on one batch; what training saw is recorded."""
        began = time.perf_counter()
        if self.role.rank == 0:
            self.service.announce(phase="train", kind=step.kind, step=step.number, total_steps=self.config.total_steps)
        self.trainer.start_phase(step.kind)
        manifest = self.manifest(folder)
        with self.phase("train", step.number) as facts, self.profiled(step):
            batch = self.trainer.open_batch(manifest, folder)
            found = [self.trainer.train_step(batch, index) for index in range(batch.steps)]
            self.metrics = {name: combine(name, [values[name] for values in found]) for name in found[0]} | batch.metrics()
            self.trainer.close_batch(batch, self.folder.train(step.number), self.fence)
            facts["tokens"] = manifest.tokens
        self.step_done(step, manifest)
        seconds = self.metrics["perf/train_time"] = time.perf_counter() - began
        self.metrics["perf/actor_train_tok_per_s"] = manifest.tokens / seconds

    def manifest(self, folder: Path) -> Manifest:
        """Of a batch."""
        return read_manifest(folder)

    def step_done(self, step: Step, manifest: Manifest) -> None:
        """This step is behind the run."""
        self.trained = step.number
        self.next_draw = manifest.next_draw if step.kind == "rollout" else self.next_draw

    def profiled(self, step: Step) -> AbstractContextManager[None]:
        """Trace what happens inside, if this step is to be."""
        return profiled(self.config.profile, step.number, self.folder.profile(step.number) / f"rank_{self.role.rank}.json.gz", self.fence)

    def sync(self) -> None:
        """Give the engines the present weights, and make sure that they hold them."""
        began = time.perf_counter()
        with self.phase("sync", self.trained):
            if self.guests:
                self.engines = self.ranks.broadcast_json(self.service.engines() if self.role.rank == 0 else None)
            self.push(self.engines)
        self.metrics["perf/update_weights_time"] = time.perf_counter() - began

    def push(self, urls: list[str]) -> None:
        """Give these engines the present weights, verified. Collective. Where engines come and go, those that are gone are no failure."""
        transport = self.transport(urls)
        self.checksum = transport.push(self.trainer, version=self.version) if urls else self.trainer.weight_checksum()
        if self.guests and self.role.rank == 0:
            self.service.synced(self.checksum, transport.engines.urls, transport.engines.lost)

    def transport(self, urls: list[str]) -> DiskTransport | TensorTransport:
        """How weights reach these engines."""
        if self.config.train.update_weight_transport == "tensor":
            return TensorTransport(urls, self.role.token, may_leave=self.guests)
        return DiskTransport(self.folder.attempt(self.role.epoch) / "sync", urls, self.role.token, may_leave=self.guests)

    def evaluate(self) -> None:
        """Evaluate the present weights; rank 0 writes the metrics once a step, also when a resumed run evaluates again."""
        number = self.trained
        with self.phase("eval", number):
            # Through a stop: the step is told whole, and all ranks stop together at the next batch.
            folder = self.sealed(lambda: Path(self.service.batch(self.job("eval", number), through_stop=True)).parent)
            if self.role.rank != 0:
                return
            manifest = read_manifest(folder)
            rows: dict[str, list[Any]] = {}
            for entry in manifest.shards:
                with open_shard(folder / entry.name) as shard:
                    for name, values in shard.sequences().items():
                        rows.setdefault(name, []).append(values)
        found = summarise_sequences(join_sequences(rows))
        if not any(line.get("kind") == "eval" and line["step"] == number for line in read_metrics(self.folder.metrics)):
            self.told.append({"step": number, "kind": "eval", "time": time.time(), **found})
        self.service.announce(phase="eval", kind="eval", step=number, total_steps=self.config.total_steps, accuracy=found["eval/accuracy"])

    def record(self, step: Step) -> None:
        """One line of metrics, told to the service as well."""
        if self.role.rank != 0:
            return
        line = {"step": step.number, "kind": step.kind, "time": time.time(), **self.metrics}
        self.told.append(line)
        print(f"trainer: {step_line(line, self.config.total_steps)}", flush=True)
        self.service.announce(phase=step.kind, kind=step.kind, step=step.number, total_steps=self.config.total_steps, metrics=self.metrics)

    def save(self, stop: bool = False) -> None:
        """A checkpoint of the present step, unless there is one; then old ones and old batches go. stop: for a stop's sake; the timeline says so, always."""
        if self.saved == self.trained and not stop:
            return
        with self.phase("save", self.trained) as facts:
            facts |= {"stop": True} if stop else {}
            if self.saved == self.trained:
                return
            progress = {"trained": self.trained, "next_draw": self.next_draw, "checksum": self.checksum}
            self.trainer.save(self.folder.checkpoints, self.trained, progress, self.fence)
            self.saved = self.trained
            if self.role.rank == 0:
                retire_batches(self.fence, retention(self.config.checkpoint), self.trained)

    def finish(self) -> None:
        """Export the final weights and let the others go."""
        self.export()
        shutil.rmtree(self.folder.attempt(self.role.epoch) / "sync", ignore_errors=True)
        if self.role.rank == 0:
            self.service.finish()

    def export(self) -> None:
        """The weights as a Hugging Face folder, if they are the final ones."""
        if self.config.checkpoint.save_hf and self.trained >= self.config.total_steps:
            self.trainer.export_hf(self.folder.hf, self.fence)

    def close(self) -> None:
        """Leave the process group."""
        stop_ranks()


def model_folder(config: RunConfig, fence: Fence) -> Path:
    """Folder of the initial model; made by `model.build` where the configuration names no folder that exists."""
    named, run_dir = config.model.hf_checkpoint, fence.run_dir.path
    folder = Path(named) if named else run_dir / "model"
    if folder.exists():
        return folder
    if config.model.build is None:
        raise UserError(f"model.hf_checkpoint: no folder {folder}; give a Hugging Face folder, or model.build to make one")
    build = load_function(config.model.build, "model.build")
    # One of our own is made where a newer attempt takes it away; a named one may lie on another disk.
    temporary = folder.with_name(folder.name + ".making") if named else fence.staging / folder.name
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        build(temporary, config.seed)
    except Exception as error:  # whatever a user's function raises
        line = disk_full(error, run_dir) or f"model.build: {config.model.build} raised {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        raise UserError(line) from error
    if not temporary.is_dir():
        raise UserError(f"model.build: {config.model.build} made no folder {temporary}; it is called with (folder, seed)")
    if named:
        temporary.rename(folder)
    else:
        fence.replace_folder(temporary, folder)
    return folder


def retention(checkpoint: Checkpoint) -> Bounds:
    """How much of what was recorded is kept."""
    days = checkpoint.retain_batches_days
    return Bounds(checkpoint.retain_batches, None if days is None else days * 86400, checkpoint.retain_batches_bytes)


def step_line(line: dict[str, Any], total: int) -> str:
    """A line of metrics as the trainer's log shows it: step, kind, loss, reward, gradient norm, seconds of training and of the weight update."""
    names = {
        "train/loss": "loss", "rollout/raw_reward": "reward", "train/grad_norm": "grad norm", "perf/train_time": "train s",
        "perf/update_weights_time": "sync s",
    }  # fmt: skip
    facts = [f"{words} {line[name]:.4g}" for name, words in names.items() if name in line]
    return ", ".join([f"step {line['step']}/{total} ({line['kind']})", *facts])


def combine(name: str, values: list[float]) -> float:
    """A metric of several optimizer steps on one rollout: greatest maximum, least minimum, sum of counts, mean of the rest."""
    words = name.rpartition("/")[2].split("_")
    if "max" in words:
        return max(values)
    if "min" in words:
        return min(values)
    return sum(values) if name.endswith(("_not_finite", "_tokens")) else sum(values) / len(values)


def join_sequences(rows: dict[str, list[Any]]) -> dict[str, Any]:
    """Small arrays of several shards as one (offsets continue)."""
    joined = {name: np.concatenate(parts) for name, parts in rows.items() if name != "offset"}
    lengths = np.concatenate([np.diff(offset.astype(np.int64)) for offset in rows["offset"]])
    joined["offset"] = np.concatenate([[0], np.cumsum(lengths)])
    return joined
