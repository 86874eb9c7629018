"""What runs on every node of a preflight: all probes, one after another, each within bounds. Its report goes to the hub, and is returned as well."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from miles.slurm.preflight import clock, files, gpus, nccl, network
from miles.slurm.preflight.hub import Guest
from miles.slurm.preflight.infiniband import infiniband
from miles.slurm.preflight.pairs import partner, rounds
from miles.slurm.preflight.verdict import Verdict, broken, not_checked, ok

PRESENT = "present"  # the hub's word for the nodes that are tested together
DONE = "done"  # done/NODE: a node has nothing more to say


@dataclass(frozen=True)
class Plan:
    """What a node is told. nodes: of the whole job, group after group; group: this one's name and nodes; seconds: how long others are
    waited for; patience: how long for those that start late."""

    hub: tuple[str, int]
    token: str
    folder: str
    nodes: list[str]
    group: str
    mine: list[str]
    device: str
    gpus: int
    counts_gpus: bool
    image: str | None
    read: list[str]
    port: int
    seconds: float
    patience: float
    megabytes: int
    rounds: int


def probe(plan: dict[str, Any]) -> dict[str, Any]:
    """The body of the step (called by import name with a Plan's fields): {"code": 0, "report": …}."""
    told = Plan(**{**plan, "hub": tuple(plan["hub"])})
    name, host = os.environ.get("SLURMD_NODENAME", socket.gethostname()), os.environ["MILES_HOST"]
    found: dict[str, Verdict] = {}
    wrote = _tried(lambda: files.canary_write(Path(told.folder), name))
    found["gpus granted"] = gpus.granted(told.gpus, told.counts_gpus)
    found["gpu health"] = gpus.health(told.device, told.gpus)
    found["fabric"] = gpus.fabric(told.device)
    found["imex"] = gpus.imex(told.device == "cuda" and os.environ.get("NCCL_MNNVL_ENABLE", "0") not in ("0", ""))
    found["infiniband"] = infiniband()
    found["container"] = ok(f"runs in {told.image}") if told.image else not_checked("the group has no container_image")
    found["files"] = files.readable(told.read)
    found["ports"] = network.ports(host, told.port if told.nodes[0] == name else 0)
    report = {"node": name, "group": told.group, "host": host, "python": platform.python_version(), "architecture": platform.machine(), "probes": found}
    try:
        hub = Guest(*told.hub, told.token)
    except OSError as error:
        why = f"{told.hub[0]}:{told.hub[1]} of the first node is not reached: {error.strerror or error}"
        found |= {"hub": broken(why), "clock": not_checked(why), "network": not_checked(why), "nccl inside": not_checked(why), "nccl": not_checked(why), "shared files": _alone(wrote, why)}
        return {"code": 0, "report": report}
    found["clock"] = clock.skew(hub)
    with network.Sink(host) as sink:
        hub.tell(f"sink/{name}", [host, sink.port])
        present = hub.word(PRESENT, time.monotonic() + told.patience) or []  # from here on all of them have written
        if name not in present:
            why = "it came too late to be tested with the others"
            found |= {"shared files": _alone(wrote, why), "network": not_checked(why), "nccl inside": not_checked(why), "nccl": not_checked(why)}
            hub.tell(f"report/{name}", report)
            hub.tell(f"{DONE}/{name}", True)
            return {"code": 0, "report": report}
        told = replace(told, nodes=present, mine=[node for node in told.mine if node in present])
        found["shared files"] = _shared(told, wrote)
        found["network"] = tcp(told, hub, name)
        hub.together("sent", name, len(told.nodes), time.monotonic() + told.seconds)  # the sink is needed until then
    found["nccl"] = found["nccl inside"] = not_checked("the preflight's time was over before")
    hub.tell(f"report/{name}", report)  # NCCL may take long, and the job may end meanwhile
    found["nccl inside"] = inside(told, host)
    hub.tell(f"report/{name}", report)
    found["nccl"] = fast(told, hub, name, host, report)
    hub.tell(f"report/{name}", report)
    hub.tell(f"{DONE}/{name}", True)
    return {"code": 0, "report": report}


def _tried(write: Callable[[], None]) -> str | None:
    """Why it could not be done."""
    try:
        write()
    except OSError as error:
        return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    return None


def _alone(wrote: str | None, why: str) -> Verdict:
    return broken(f"can't write {wrote}") if wrote else not_checked(why)


def _shared(told: Plan, wrote: str | None) -> Verdict:
    """Its own view: the canaries of all others. Who is to blame for one that isn't seen is judged with everybody's view at hand."""
    if wrote:
        return broken(f"can't write {wrote}", wrote=False)
    if files.canary_seen(Path(told.folder).parent, [files.LOGIN], told.seconds)[1]:
        return broken(f"doesn't see within {told.seconds:g} s what the login node wrote", wrote=True)
    spent, missing = files.canary_seen(Path(told.folder), told.nodes, told.seconds)
    detail = f"sees what {len(told.nodes)} nodes wrote after {spent:.1f} s" if not missing else f"doesn't see within {told.seconds:g} s what {', '.join(missing)} wrote"
    return {**ok(detail), "seconds": spent, "missing": missing, "wrote": True}


def tcp(told: Plan, hub: Guest, name: str) -> Verdict:
    """MiB/s to other nodes, pair by pair; `rates` is by node, null where it wasn't reached."""
    if len(told.nodes) == 1:
        return not_checked("there is no other node")
    rates: dict[str, float | None] = {}
    why = ""
    for _, me, other in meetings(hub, told.nodes, name, "round", told.rounds, told.seconds):
        peer = told.nodes[other]
        if me > other or (address := hub.word(f"sink/{peer}", time.monotonic() + 1.0)) is None:
            continue  # the latter never came this far: its own report, or the lack of one, says why
        host, port = str(address[0]), int(address[1])
        rates[peer] = None
        try:
            rates[peer] = network.send(host, port, told.megabytes)
        except OSError as error:
            why = f"{peer} at {host}: {error.strerror or error}"
    if why:
        return {**ok(f"not reached: {why}"), "rates": rates}
    known = [rate for rate in rates.values() if rate is not None]
    return {**ok(f"{_span(known, '.0f')} MiB/s over TCP, {len(known)} node{'' if len(known) == 1 else 's'} reached" if known else "reached by others"), "rates": rates}


def meetings(hub: Guest, nodes: list[str], name: str, word: str, most: int, seconds: float) -> Iterator[tuple[int, int, int]]:
    """(round, own number among the nodes, the partner's) for every round that this node is paired in; after each round it waits for all others to end theirs."""
    me = nodes.index(name)
    for number, pairs in enumerate(rounds(len(nodes), most)):
        if (other := partner(pairs, me)) is not None:
            yield number, me, other
        hub.together(f"{word}{number}", name, len(nodes), time.monotonic() + seconds)


def _span(figures: list[float], form: str) -> str:
    low, high = format(min(figures), form), format(max(figures), form)
    return low if low == high else f"{low} to {high}"


def inside(told: Plan, host: str) -> Verdict:
    """GB/s of NCCL between all GPUs of this node; that each of them computes, where it has but one."""
    if (no := _without_nccl(told)) is not None:
        return not_checked(no)
    rate, why = nccl.measured(told.gpus, host, {gpu: gpu for gpu in range(told.gpus)}, lambda port: (host, port or 0))
    if rate is None:
        return broken(why)
    return ok(f"{rate:.1f} GB/s between {told.gpus} GPUs", gigabytes=rate) if told.gpus > 1 else ok("its GPU computes")


def _without_nccl(told: Plan) -> str | None:
    return f"cluster.device is {told.device}" if told.device != "cuda" else "the group has no GPUs" if not told.gpus else nccl.missing()


def fast(told: Plan, hub: Guest, name: str, host: str, report: dict[str, Any]) -> Verdict:
    """GB/s of NCCL between GPU 0 of this node and of others of its group; `rates` as above. What is known so far is told after every round."""
    if (no := _without_nccl(told)) is not None:
        return not_checked(no)
    if len(told.mine) == 1:
        return not_checked("there is no other node in the group")
    rates: dict[str, float | None] = {}
    why = ""
    for number, me, other in meetings(hub, told.mine, name, f"{told.group}/nccl", told.rounds, nccl.START_SECONDS + nccl.SECONDS + told.seconds):
        key = f"nccl/{told.group}/{number}/{min(me, other)}"
        rate, said = nccl.measured(2, host, {int(me > other): 0}, lambda port, key=key: _meeting(hub, key, host, port, told.seconds))  # type: ignore[misc]
        if rate is None and me < other:
            hub.tell(key, [])  # who waits for the address need not any longer
        rates[told.mine[other]], why = rate, said or why
        report["probes"]["nccl"] = _nccl_rates(rates, why)
        hub.tell(f"report/{name}", report)
    return _nccl_rates(rates, why)


def _meeting(hub: Guest, key: str, host: str, port: int | None, seconds: float) -> tuple[str, int] | None:
    """Where rank 0 of a pair listens: said by the node that has it, heard by the other."""
    if port is not None:
        hub.tell(key, [host, port])
        return host, port
    there = hub.word(key, time.monotonic() + nccl.START_SECONDS + seconds)
    return None if not there else (str(there[0]), int(there[1]))


def _nccl_rates(rates: dict[str, float | None], why: str) -> Verdict:
    known = [rate for rate in rates.values() if rate is not None]
    if not rates:
        return not_checked("no other node came to measure with")
    return {**ok(f"{_span(known, '.1f')} GB/s to GPU 0 of {len(known)} node{'' if len(known) == 1 else 's'}" if known and not why else f"failed: {why}"), "rates": rates}
