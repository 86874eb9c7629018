"""What a group of nodes asks for, as options of sbatch and of srun. Pure; what is unset is absent.

A name has one value: what the group's own `sbatch` and `srun` say wins over what follows from its other settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from miles.config.placement import NodeGroup

Options = dict[str, str | int | None]  # long name without dashes: value, None for an option without one
PLAIN = ("partition", "account", "qos", "time", "constraint", "mem", "segment", "switches", "exclude", "nodelist", "reservation", "licenses", "comment", "wckey")


def gres(group: NodeGroup, device: str) -> str | None:
    """--gres of a node: as given, else its accelerators where it has a type of them or device is cuda."""
    ask = group.ask
    if ask.gres is not None:
        return ask.gres
    if group.gpus_per_node and (ask.gpu_type is not None or device == "cuda"):
        return ":".join(["gpu", *([ask.gpu_type] if ask.gpu_type else []), str(group.gpus_per_node)])
    return None


def shared(group: NodeGroup, device: str) -> Options:
    """What sbatch is asked and srun must be told again: srun inherits neither in a heterogeneous job."""
    found: Options = {}
    if group.ask.cpus_per_task is not None:
        found["cpus-per-task"] = group.ask.cpus_per_task
    wanted = gres(group, device)
    return found if wanted is None else {**found, "gres": wanted}


def sbatch_options(group: NodeGroup, device: str = "cpu") -> Options:
    """Options of the group's block of #SBATCH lines, one task a node."""
    ask = group.ask
    found: Options = {"nodes": group.nodes, "ntasks-per-node": 1, **shared(group, device)}
    found |= {name: value for name in PLAIN if (value := getattr(ask, name)) is not None}
    if ask.exclusive:
        found["exclusive"] = None
    return {**found, **ask.sbatch}


def srun_options(group: NodeGroup, device: str = "cpu", mounts: tuple[str, ...] = ()) -> Options:
    """Options of an srun on this group; mounts are added to the container's own, if there is one."""
    ask, found = group.ask, shared(group, device)
    if ask.container_image is not None:
        found["container-image"] = ask.container_image
        both = [*ask.container_mounts, *(mount for mount in mounts if mount not in ask.container_mounts)]
        if both:
            found["container-mounts"] = ",".join(both)
        if ask.container_workdir is not None:
            found["container-workdir"] = ask.container_workdir
    return {**found, **ask.srun}


def arguments(options: Mapping[str, str | int | None]) -> list[str]:
    """Options as a command's arguments."""
    return [f"--{name}" if value is None else f"--{name}={value}" for name, value in options.items()]
