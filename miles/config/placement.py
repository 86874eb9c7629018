"""Who runs where: groups of nodes, the components on them, and the processes of each node. Pure arithmetic on a configuration."""

from __future__ import annotations

from dataclasses import dataclass

from miles.config.allocation import Group
from miles.config.process import Process
from miles.config.schema import RunConfig

MERGED = ("environment", "sbatch", "srun")  # key by key; everything else is replaced


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind that are allocated together, and the components that run on them."""

    name: str
    nodes: int
    gpus_per_node: int
    components: tuple[str, ...]
    ask: Group


@dataclass(frozen=True)
class Part:
    """A component's share of its group: `nodes` nodes from first_node on, on each the `gpus` accelerators from first_gpu on."""

    component: str
    group: str
    first_node: int
    nodes: int
    first_gpu: int
    gpus: int


def components(config: RunConfig) -> tuple[str, ...]:
    """What a run is started as: recorded batches need nobody who makes them."""
    return ("train",) if config.debug.recorded else ("train", "rollout")


def engines(config: RunConfig) -> int:
    """Engines of the run."""
    return 0 if config.debug.recorded else config.rollout.num_gpus // config.rollout.num_gpus_per_engine


def ask(config: RunConfig, group: str) -> Group:
    """What is asked of Slurm for a group: its own settings over those of all groups."""
    groups = config.cluster.groups
    base, own = groups.all, groups.all if group == "all" else getattr(groups, group)
    # By value, not by what was written: run.yaml has every field written out.
    given = {name: value for name, value in own if value != Group.model_fields[name].get_default(call_default_factory=True)}
    for field in MERGED:
        given[field] = {**getattr(base, field), **getattr(own, field)}
    return base.model_copy(update=given)


def one_node(config: RunConfig) -> bool:
    """Placement split: whether trainer and engines divide the accelerators of a single node."""
    train, rollout = config.train, config.rollout
    gpus = ask(config, "all").gpus_per_node or config.cluster.gpus_per_node
    return ask(config, "all").nodes in (None, 1) and train.num_nodes == 1 and train.num_gpus_per_node + rollout.num_gpus <= gpus


def node_groups(config: RunConfig) -> tuple[NodeGroup, ...]:
    """The groups of nodes that are allocated, the trainer's first."""
    names = components(config)
    if config.cluster.placement in ("colocate", "split") or len(names) == 1:
        wanted = ask(config, "all" if config.cluster.placement in ("colocate", "split") else "train")
        gpus = wanted.gpus_per_node or config.cluster.gpus_per_node
        nodes = config.train.num_nodes
        if config.cluster.placement == "split" and "rollout" in names and not one_node(config):
            nodes += -(-config.rollout.num_gpus // gpus)
        return (NodeGroup("all" if config.cluster.placement in ("colocate", "split") else "train", wanted.nodes or nodes, gpus, names, wanted),)
    found = []
    for name in names:
        wanted = ask(config, name)
        gpus = wanted.gpus_per_node or config.cluster.gpus_per_node
        nodes = config.train.num_nodes if name == "train" else -(-config.rollout.num_gpus // gpus)
        found.append(NodeGroup(name, wanted.nodes or nodes, gpus, (name,), wanted))
    return tuple(found)


def parts(config: RunConfig) -> tuple[Part, ...]:
    """Where each component runs."""
    train, found = config.train, []
    for group in node_groups(config):
        for name in group.components:
            first_node, nodes, first_gpu, gpus = 0, group.nodes, 0, group.gpus_per_node
            if name == "train":
                nodes, gpus = train.num_nodes, train.num_gpus_per_node
            elif config.cluster.placement == "split":
                if one_node(config):
                    first_gpu, gpus = train.num_gpus_per_node, config.rollout.num_gpus
                else:
                    first_node, nodes = train.num_nodes, group.nodes - train.num_nodes
            if name == "rollout":
                nodes = min(nodes, engines(config))  # a worker without engines would have nothing to do
            found.append(Part(name, group.name, first_node, nodes, first_gpu, gpus))
    return tuple(found)


def part(config: RunConfig, component: str) -> Part:
    """Where one component runs."""
    return next(each for each in parts(config) if each.component == component)


def processes(config: RunConfig, component: str, node: int) -> list[Process]:
    """Every process of a component on its `node`th node (from 0): rollout service and trainer ranks, or engines and a worker.

    Engines are spread evenly over the component's nodes; ranks of trainers and engines count through all nodes.
    """
    place = part(config, component)
    if component == "train":
        ranks = config.train.num_gpus_per_node
        trainers = [Process("trainer", node * ranks + i, ranks * place.nodes, (place.first_gpu + i,)) for i in range(ranks)]
        return [*([Process("service", 0, 1, ())] if node == 0 else []), *trainers]
    count, each = engines(config), config.rollout.num_gpus_per_engine
    mine = range(count * node // place.nodes, count * (node + 1) // place.nodes)
    found = [
        Process("engine", rank, count, tuple(place.first_gpu + (rank - mine.start) * each + gpu for gpu in range(each))) for rank in mine
    ]
    return [*found, Process("worker", node, place.nodes, ())]
