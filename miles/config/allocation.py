"""What is asked of Slurm: for each group of nodes, and for the job as a whole. What is unset is absent from the submission."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from miles.config.raw_options import SBATCH, SRUN, check_mounts, check_options, check_setup, check_variables
from miles.config.section import Section
from miles.config.units import minutes_of


class Group(Section):
    """One group of nodes: what it is, and what its allocation asks for."""

    nodes: int | None = Field(None, ge=1, description="nodes; default: what train and rollout need [nodes]")
    gpus_per_node: int | None = Field(None, ge=1, description="accelerators of one node; default: cluster.gpus_per_node")
    gpu_type: str | None = Field(None, description="Slurm's name of the accelerator, such as h200")
    gpu_memory: float | None = Field(None, gt=0, description="memory of one accelerator [GiB]; default: cluster.gpu_memory")
    domain_nodes: int | None = Field(None, ge=1, description="nodes of one NVLink domain (NVL72: 18 trays); an expert-parallel group that leaves its domain is refused [nodes]")
    cross_domain: bool | None = Field(None, description="an expert-parallel group may lie in several NVLink domains")
    architecture: Literal["x86_64", "aarch64"] | None = Field(None, description="processor architecture; checked when a component starts")
    python: str | None = Field(None, description="interpreter of these nodes, with miles installed; default: the one that submits")
    setup: list[str] = Field(default_factory=list, description="shell lines before anything is started on these nodes, such as module load cuda")
    environment: dict[str, str] = Field(default_factory=dict, description="environment variables of these nodes' processes")
    partition: str | None = Field(None, description="--partition")
    account: str | None = Field(None, description="--account")
    qos: str | None = Field(None, description="--qos")
    time: str | None = Field(None, description="--time: minutes, H:M:S or D-H:M:S")
    constraint: str | None = Field(None, description="--constraint: features of nodes")
    gres: str | None = Field(None, description="--gres, in place of what gpus_per_node and gpu_type give")
    cpus_per_task: int | None = Field(None, ge=1, description="--cpus-per-task; there is one task a node, the supervisor of its processes")
    mem: str | None = Field(None, description="--mem of a node, such as 500G; 0 is all")
    exclusive: bool | None = Field(None, description="--exclusive: whole nodes")
    segment: int | None = Field(None, ge=1, description="--segment: nodes that lie in one block (Slurm 23.11 and later)")
    switches: str | None = Field(None, description="--switches: most leaf switches, and how long to wait for them")
    exclude: str | None = Field(None, description="--exclude: nodes never taken")
    nodelist: str | None = Field(None, description="--nodelist: nodes that must be among those taken")
    reservation: str | None = Field(None, description="--reservation")
    licenses: str | None = Field(None, description="--licenses")
    comment: str | None = Field(None, description="--comment")
    wckey: str | None = Field(None, description="--wckey")
    container_image: str | None = Field(None, description="image that the group's processes run in (pyxis: srun's --container-image)")
    container_mounts: list[str] = Field(default_factory=list, description="folders seen inside, as FROM:TO or FROM:TO:FLAGS; the run directory is always added")
    container_workdir: str | None = Field(None, description="working folder inside")
    sbatch: dict[str, str | int | None] = Field(default_factory=dict, description="further #SBATCH options by long name without dashes; null: an option without a value")
    srun: dict[str, str | int | None] = Field(default_factory=dict, description="further srun options by long name without dashes; null: an option without a value")

    @field_validator("environment", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        """Numbers are what people write for NCCL's switches; anything else that is no text is refused."""
        return {name: _text(each) for name, each in value.items()} if isinstance(value, dict) else value

    @field_validator("environment")
    @classmethod
    def _variables(cls, value: dict[str, str]) -> dict[str, str]:
        check_variables(value)
        return value

    @field_validator("setup")
    @classmethod
    def _setup(cls, value: list[str]) -> list[str]:
        check_setup(value)
        return value

    @field_validator("container_mounts")
    @classmethod
    def _mounts(cls, value: list[str]) -> list[str]:
        check_mounts(value)
        return value

    @field_validator("sbatch")
    @classmethod
    def _sbatch(cls, value: dict[str, str | int | None]) -> dict[str, str | int | None]:
        check_options(value, SBATCH, "sbatch")
        return value

    @field_validator("srun")
    @classmethod
    def _srun(cls, value: dict[str, str | int | None]) -> dict[str, str | int | None]:
        check_options(value, SRUN, "srun")
        return value

    @field_validator("time", "mem", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return _text(value)

    @field_validator("time")
    @classmethod
    def _time(cls, value: str | None) -> str | None:
        if value is not None:
            minutes_of(value)
        return value


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Groups(Section):
    """The groups of nodes. A group has what `all` says, unless it says otherwise (environment, sbatch and srun: key by key)."""

    all: Group = Field(default_factory=lambda: Group(), description="every group; the only one of the placements colocate and split")
    train: Group = Field(default_factory=lambda: Group(), description="nodes of the trainer (placements het and jobs)")
    rollout: Group = Field(default_factory=lambda: Group(), description="nodes of the engines (placements het and jobs)")


class Slurm(Section):
    """The job as a whole."""

    job_name: str | None = Field(None, description="--job-name; default: the run's name")
    python: str | None = Field(None, description="interpreter of the batch script, outside of containers; default: the first group's, or the one that submits where that group has an image")
    requeue: Literal["requeue", "chain", "none"] = Field("requeue", description="how a run goes on after its job: the job is requeued, waits as the next of a --dependency=singleton chain, or not at all")
    chain: int = Field(4, ge=1, description="jobs of a chain")
    lead_seconds: int = Field(300, ge=1, description="seconds before the time limit at which the run is told to save and end (--signal)")
    partner_seconds: float = Field(600.0, gt=0, description="placement jobs: seconds that a running group waits for its running partner; queueing doesn't count")
    queue_seconds: float | None = Field(None, gt=0, description="placement jobs: seconds that a running group holds its nodes while its partner queues; default: no limit")
    exclude_failed: bool = Field(True, description="nodes that failed are excluded from the run's later allocations")
    exclude_file: str | None = Field(None, description="file of nodes that no submission asks for, shared by several runs; miles-submit preflight adds slow and broken ones to it (default: to the run's own list)")
