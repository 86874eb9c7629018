"""The trackers themselves: a run opened again under the same id, numbers by step, and the job that they come from. Packages are imported when one is opened."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from miles.config.schema import RunConfig
from miles.data.store.files import read_json
from miles.data.store.run_dir import RunDir

Numbers = Mapping[str, float]


class Sink(Protocol):
    """Takes the numbers of a step."""

    identity: str | None  # under which the run is opened again

    def log(self, numbers: Numbers, step: int, time: float) -> None: ...

    def close(self) -> None: ...


def job() -> dict[str, str]:
    """The Slurm job that this runs in, and how often it was restarted; empty outside of one."""
    number = os.environ.get("SLURM_JOB_ID")
    return {"slurm_job_id": number, "slurm_restart_count": os.environ.get("SLURM_RESTART_COUNT", "0")} if number else {}


class TensorBoard:
    """An event file for each process that writes, in one folder: TensorBoard reads them as one run."""

    identity: str | None = None

    def __init__(self, run: RunDir, config: RunConfig, identity: str | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        here = job()
        self.event, self.summary = Event, Summary
        self.writer = EventFileWriter(str(run.path / config.trackers.tensorboard_folder), filename_suffix="".join(f".{value}" for value in here.values()))
        text = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        for name, value in here.items():
            tensor = TensorProto(dtype="DT_STRING", string_val=[value.encode()])
            self.writer.add_event(Event(step=0, summary=Summary(value=[Summary.Value(tag=name, metadata=text, tensor=tensor)])))

    def log(self, numbers: Numbers, step: int, time: float) -> None:
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self.writer.add_event(self.event(wall_time=time, step=step, summary=self.summary(value=values)))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, run: RunDir, config: RunConfig, identity: str | None) -> None:
        import wandb

        here, wanted = job(), config.trackers
        self.identity: str | None = identity or secrets.token_hex(4)
        self.run = wandb.init(
            project=wanted.wandb_project or "miles",
            entity=wanted.wandb_entity,
            mode=wanted.wandb_mode,
            dir=str(run.path),
            id=self.identity,
            name=config.name,
            resume="allow",
            tags=[f"slurm-{here['slurm_job_id']}"] if here else None,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        self.run.config.update(here, allow_val_change=True)

    def log(self, numbers: Numbers, step: int, time: float) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """A run of MLflow."""

    def __init__(self, run: RunDir, config: RunConfig, identity: str | None) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self.metric = Metric
        self.client = MlflowClient(tracking_uri=config.trackers.mlflow_uri)
        if identity is None:
            name = config.trackers.mlflow_experiment or "miles"
            found = self.client.get_experiment_by_name(name)
            experiment = found.experiment_id if found is not None else self.client.create_experiment(name)
            identity = self.client.create_run(experiment, run_name=config.name, tags={"run_dir": str(run.path)}).info.run_id
        self.identity: str | None = identity
        self.opened = identity
        self.client.update_run(identity, status="RUNNING")
        for key, value in job().items():
            self.client.set_tag(identity, key, value)

    def log(self, numbers: Numbers, step: int, time: float) -> None:
        self.client.log_batch(self.opened, metrics=[self.metric(name, value, int(time * 1000), step) for name, value in numbers.items()])

    def close(self) -> None:
        self.client.set_terminated(self.opened)


SINKS: dict[str, Callable[[RunDir, RunConfig, str | None], Sink]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}


def state_file(run: RunDir) -> Path:
    """What each tracker was sent, and under which identity."""
    return run.path / "trackers.json"


def read_state(run: RunDir) -> dict[str, Any]:
    """{tracker: {"identity": str | null, "sent": {kind: last step}}}; empty before the first."""
    path = state_file(run)
    return dict(read_json(path)) if path.exists() else {}
