"""What drivers, libraries and Slurm write into logs when something breaks, what it means, and what helps. Data: add a line for a new one."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """pattern: searched in every line of the newest attempt. weight: as in Diagnosis. hardware: whether the node is suspect."""

    cause: str
    pattern: re.Pattern[str]
    weight: int
    happened: str
    mend: str
    hardware: bool = False


def _sign(cause: str, pattern: str, weight: int, happened: str, mend: str, hardware: bool = False) -> Sign:
    return Sign(cause, re.compile(pattern), weight, happened, mend, hardware)


# The first sign of a line counts.
SIGNS = (
    _sign("xid", r"NVRM: Xid|\bXid \(PCI|\bXid[: ]+\d+", 88, "a GPU reported a fault to its driver (Xid)", "exclude the node (`cluster.groups.all.exclude`) and tell the cluster's operators the Xid", True),
    _sign("gpu_fault", r"uncorrectable (NVLink|ECC) error|CUDA error: (an illegal instruction|misaligned address|unspecified launch failure|hardware stack error)|device-side assert|GPU is lost|fallen off the bus|system not yet initialized|cudaErrorDevicesUnavailable|busy or unavailable", 82, "a GPU failed, or is not usable on this node", "run `miles-submit preflight RUN`, which names and excludes broken nodes; then `miles-submit resume RUN`", True),
    _sign("gpu_memory", r"CUDA out of memory|torch(\.cuda)?\.OutOfMemoryError|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED", 84, "a GPU ran out of memory", "see `miles-submit plan`'s memory per GPU; lower train.max_tokens_per_gpu or rollout.kv_cache_tokens or mem_fraction_static, or give it more GPUs; then `miles-submit resume RUN`"),
    _sign("memory", r"oom[-_]kill|Out Of Memory|DefaultCPUAllocator: can't allocate memory|^MemoryError|Cannot allocate memory|Exceeded (job|step) memory limit", 84, "a process was killed for want of main memory, or could not get any", "ask for more (`cluster.groups.all.mem`; 0 is all of the node's), then `miles-submit resume RUN`"),
    _sign("disk_full", r"No space left on device|Disk quota exceeded|disk full at ", 86, "a disk is full", "free some space (the line names the file), or keep less (checkpoint.retain, checkpoint.retain_batches); then `miles-submit resume RUN`"),
    _sign("shared_memory", r"unable to (open|write to|allocate) shared memory|Bus error", 70, "shared memory (/dev/shm) ran out, or a mapped file was cut", "give the container more /dev/shm, or free it on the node", True),
    _sign("imex", r"IMEX|fabric.*not (ready|initiali[sz]ed)|CUDA_ERROR_SYSTEM_NOT_READY|nvlsAlloc|MNNVL.*(fail|error)", 76, "NVLink between nodes (IMEX, fabric manager) is not set up", "run `miles-submit preflight RUN`; without an IMEX channel set NCCL_MNNVL_ENABLE=0 in cluster.groups.all.environment", True),
    _sign("nccl_network", r"NCCL WARN.*(ibv_|IB |Mlx|mlx5|NET/|Call to connect)|ibv_(reg_mr|create_qp|modify_qp).*fail|got completion.*with error 12|No route to host|Network is unreachable", 66, "a network connection between nodes could not be made, or broke", "run `miles-submit preflight RUN`; if addresses are wrong, set NCCL_SOCKET_IFNAME (cluster.groups.all.environment) or cluster.host", True),
    _sign("collective_timeout", r"Watchdog caught collective operation timeout|collective operation timed? ?out|Timed out waiting \d+ms for (recv|send)", 58, "a collective waited in vain: some rank was lost or held up", "look at the first rank that failed or hung, above; if none did, `miles-submit preflight RUN`"),
    _sign("connection_lost", r"Connection (closed by peer|reset by peer)|ncclRemoteError|ncclSystemError|NCCL error|remote process exited|Broken pipe|\[.*gloo.*\]|Socket Timeout|recvValue failed|sendBytes failed", 35, "a rank lost its connection to another: mostly an echo of that one's end", "look at what ended the other first; `miles-submit resume RUN` goes on from the last checkpoint"),
    _sign("port", r"Address already in use|EADDRINUSE", 62, "a port is taken, by another job on the node or by what an earlier attempt left", "set cluster.port to a free one or leave it unset; with shared nodes ask for whole ones (`cluster.groups.all.exclusive: true`)"),
    _sign("library", r"error while loading shared libraries|undefined symbol:|GLIBC_\S+ not found|Exec format error|No module named|execve\(\): \S+: No such file", 72, "a program or library is not there, or is for another machine", "look at the group's python, setup and container_image (cluster.groups): the nodes must see an interpreter of their own architecture with miles in it"),
    _sign("container", r"pyxis: (?!imported|importing|creating|starting|removing)|enroot-|\[ERROR\] .*(image|squash)", 74, "the container could not be started", "check cluster.groups' container_image and mounts on a node: `miles-submit preflight RUN`"),
    _sign("stale_files", r"Stale file handle|Input/output error|Remote I/O error|Transport endpoint is not connected", 78, "the shared file system failed on a node", "run `miles-submit preflight RUN`, which tests it on every node; exclude the node if it is one", True),
    _sign("time_limit", r"DUE TO TIME LIMIT", 80, "the job reached its time limit", "ask for more (`cluster.groups.all.time`) or give it longer to save (cluster.slurm.lead_seconds); `miles-submit resume RUN` goes on from the last checkpoint"),
    _sign("preempted", r"DUE TO PREEMPTION", 80, "the job was preempted", "`miles-submit resume RUN` if it wasn't requeued"),
    _sign("node_failed", r"DUE TO NODE FAILURE|DUE to SIGNAL Node failure|Node failure on", 85, "a node failed", "`miles-submit resume RUN`: failed nodes are left out", True),
    _sign("launch", r"Unable to create step|Task launch .*failed|Job credential (expired|revoked|replayed)|Slurmd could not|Zero Bytes were transmitted|Communication connection failure|Requested node configuration is not available|Memory required by task is not available|Invalid generic resource", 73, "Slurm could not start the run's processes", "look at the line; what a group asks of srun (gres, cpus_per_task, srun) must fit what its job has: `miles-submit plan`"),
    _sign("native_crash", r"Segmentation fault|SIGSEGV|Fatal Python error", 60, "a process crashed in native code", "look at the stack below the line; if it always happens on one node, exclude that"),
)  # fmt: skip
