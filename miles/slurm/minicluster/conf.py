"""The configuration files of a private cluster, as text."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from miles.slurm.minicluster.database import me
from miles.slurm.minicluster.layout import Layout, NodeGroup, Settings

BLOCKS_SINCE = (23, 11)  # topology/block and --segment
CGROUP_CAN_BE_DISABLED_SINCE = (23, 11)


@dataclass(frozen=True)
class Place:
    """What the files depend on besides the layout: folder, ports, version, plugins of another installation, a database."""

    folder: Path
    ports: list[int]  # one for slurmctld, one for slurmdbd, then one a node
    version: tuple[int, int]
    plugins: Path | None
    accounting: bool

    @property
    def munge_socket(self) -> Path:
        """Where munged answers."""
        return self.folder / "munge" / "s"


def files(place: Place, layout: Layout, settings: Settings) -> dict[str, str]:
    """{name: text} of all files of the folder `conf`. slurmdbd.conf must be readable by its owner only."""
    found = {"slurm.conf": slurm_conf(place, layout, settings), "gres.conf": gres_conf(place, layout)}
    # Nothing here uses cgroups, but slurmd loads the plugin, and that of v2 wants systemd and its delegation; that of v1 wants nothing before it is used.
    found["cgroup.conf"] = f"CgroupPlugin={'disabled' if place.version >= CGROUP_CAN_BE_DISABLED_SINCE else 'cgroup/v1'}\n"
    if place.version >= BLOCKS_SINCE and layout.blocks:
        found["topology.conf"] = topology_conf(layout)
    if place.accounting:
        found["slurmdbd.conf"] = slurmdbd_conf(place)
    return found


def slurm_conf(place: Place, layout: Layout, settings: Settings) -> str:
    """slurm.conf: the waits of a real cluster made short, several slurmd on one host, no cgroups."""
    host, user, folder = _host(), me(), place.folder
    keys: dict[str, object] = {
        "ClusterName": "mini",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": place.ports[0],
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        # cred_expire is also how long a requeued job waits; real clusters have 120.
        "AuthInfo": f"socket={place.munge_socket},cred_expire={settings.requeue_delay_seconds}",
        "CredType": "cred/munge",
        "MpiDefault": "none",
        "DefMemPerCPU": 200,
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "SchedulerType": "sched/backfill",
        # Heterogeneous jobs start in the backfill loop alone; real clusters run it every 30 s.
        "SchedulerParameters": "bf_interval=1,bf_resolution=60,bf_hetjob_immediate,sched_min_interval=1000,sched_interval=2,batch_sched_delay=0,preempt_youngest_first",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmctldParameters": "preempt_send_user_signal",
        "SlurmdParameters": "config_overrides",
        "GresTypes": "gpu",
        "ReturnToService": 2,
        "JobRequeue": 1,
        "KillWait": settings.kill_wait_seconds,
        "MinJobAge": 600,
        "SlurmctldTimeout": 30,
        "SlurmdTimeout": settings.slurmd_timeout_seconds,
        "InactiveLimit": 0,
        "BatchStartTimeout": 20,
        "MessageTimeout": settings.message_timeout_seconds,
        "TCPTimeout": 2,
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool" / "%n",
        "SlurmctldPidFile": folder / "run" / "slurmctld.pid",
        "SlurmdPidFile": folder / "run" / "slurmd-%n.pid",
        "SlurmctldLogFile": folder / "log" / "slurmctld.log",
        "SlurmdLogFile": folder / "log" / "slurmd-%n.log",
        "SlurmctldDebug": "info",
        "SlurmdDebug": "info",
        "JobCompType": "jobcomp/filetxt",
        "JobCompLoc": folder / "log" / "jobcomp.txt",
    }
    if place.accounting:
        keys |= {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": place.ports[1],
            "AccountingStoragePass": place.munge_socket,  # or slurmctld asks the system's munge
            "AccountingStorageEnforce": "associations,qos",
            "AccountingStorageTRES": "gres/gpu",
        }
    else:
        keys["AccountingStorageType"] = "accounting_storage/none"
    if place.version >= BLOCKS_SINCE and layout.blocks:
        keys["TopologyPlugin"] = "topology/block"
    if place.plugins is not None:
        keys["PluginDir"] = place.plugins
    own = {name.lower(): name for name in keys}
    further = []
    for line in settings.lines:
        name, _, value = line.partition("=")
        if name.lower() in own:
            keys[own[name.lower()]] = value
        else:
            further.append(line)
    lines = [f"{name}={value}" for name, value in keys.items()]
    return "\n".join([*lines, *further, *_nodes(place, layout, host), *_partitions(layout, settings)]) + "\n"


def _nodes(place: Place, layout: Layout, host: str) -> list[str]:
    lines = []
    for index, (group, node) in enumerate((kind, name) for kind in layout.groups for name in kind.nodes):
        line = f"NodeName={node} NodeHostname={host} NodeAddr=127.0.77.{index + 1} Port={place.ports[2 + index]}"
        line += f" CPUs={group.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={group.cpus} ThreadsPerCore=1 RealMemory={group.memory_mb}"
        line += f" Gres=gpu:{group.gpu_type}:{group.gpus}" if group.gpus else ""
        line += f" Feature={','.join(group.features)}" if group.features else ""
        lines.append(line)
    return lines


def _partitions(layout: Layout, settings: Settings) -> list[str]:
    names = {group.name: _range(group) for group in layout.groups}
    lines = []
    for part in layout.partitions:
        line = f"PartitionName={part.name} Nodes={','.join(names[group] for group in part.groups)} MaxTime=INFINITE State=UP PriorityTier={part.tier}"
        line += f" PreemptMode=REQUEUE GraceTime={settings.grace_seconds}" if part.preemptable else " PreemptMode=OFF"
        lines.append(line + (" Default=YES" if part.default else ""))
    return lines


def _range(group: NodeGroup) -> str:
    return f"{group.name}[0-{group.count - 1}]"


def gres_conf(place: Place, layout: Layout) -> str:
    """gres.conf: each GPU is a link to /dev/null. A count alone is dropped, and /dev/null itself counts once."""
    devices = place.folder / "dev"
    return "".join(
        f"NodeName={_range(group)} Name=gpu Type={group.gpu_type} File={devices}/nvidia[0-{group.gpus - 1}]\n" for group in layout.groups if group.gpus
    )


def topology_conf(layout: Layout) -> str:
    """topology.conf of topology/block. Slurm refuses a block with fewer nodes than BlockSizes says."""
    lines = [f"BlockName={name} Nodes={','.join(nodes)}" for name, nodes in layout.blocks.items()]
    return "\n".join([*lines, f"BlockSizes={layout.nodes_per_block}"]) + "\n"


def slurmdbd_conf(place: Place) -> str:
    """slurmdbd.conf; the database is reached by the socket that MYSQL_UNIX_PORT names."""
    return "\n".join(
        [
            "AuthType=auth/munge",
            f"AuthInfo=socket={place.munge_socket}",
            f"DbdHost={_host()}",
            "DbdAddr=127.0.0.1",
            f"DbdPort={place.ports[1]}",
            f"SlurmUser={me()}",
            f"PidFile={place.folder}/run/slurmdbd.pid",
            f"LogFile={place.folder}/log/slurmdbd.log",
            "DebugLevel=info",
            "StorageType=accounting_storage/mysql",
            "StorageHost=localhost",
            "StorageUser=slurm",
            "StorageLoc=slurm_acct_db",
            *([f"PluginDir={place.plugins}"] if place.plugins else []),
            "",
        ]
    )


def _host() -> str:
    return socket.gethostname().partition(".")[0]
