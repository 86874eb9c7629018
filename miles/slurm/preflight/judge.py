"""From the nodes' reports to verdicts on nodes: who is to blame for what only two or more can see. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from miles.slurm.preflight.verdict import BAD, Verdict, broken, not_checked, ok, slow

# Of the median of all nodes' best rates. TCP goes over networks that others use, too.
SLOW_SHARE = {"network": 0.25, "nccl": 0.5}
CLOCK_BROKEN_SECONDS = 5.0  # tokens, leases and make's rules go wrong
CLOCK_SLOW_SECONDS = 0.5  # logs of several nodes can't be ordered
Reports = dict[str, dict[str, Any]]


def judge(nodes: Sequence[str], reports: Mapping[str, Any], silent: Mapping[str, str]) -> Reports:
    """By node: {"group", "probes": {name: verdict}}. silent: nodes without a report, and why, as far as it is known."""
    found: Reports = {node: {**reports[node], "probes": dict(reports[node]["probes"])} for node in nodes if node in reports}
    _canaries(found)
    _rates(found, "network", "MiB/s")
    _rates(found, "nccl", "GB/s")
    _inside(found)
    _clocks(found)
    _files(found)
    _ports(found)
    for node in nodes:
        if node not in found:
            found[node] = {"node": node, "group": "", "probes": {"answer": broken(silent.get(node, "gave no answer"))}}
    return {node: found[node] for node in nodes}


def bad(judged: Reports) -> dict[str, str]:
    """Nodes to leave out, with the reason."""
    return {node: "; ".join(f"{name}: {each['detail']}" for name, each in report["probes"].items() if each["status"] in BAD) for node, report in judged.items() if any(each["status"] in BAD for each in report["probes"].values())}


def _canaries(found: Reports) -> None:
    """A node whose file is unseen by most is to blame for it; so is one that doesn't see what most others see."""
    views = {node: report["probes"]["shared files"] for node, report in found.items() if "missing" in report["probes"].get("shared files", {})}
    unseen = Counter(node for view in views.values() for node in view["missing"])
    hidden = {node for node, number in unseen.items() if node in views and number > len(views) / 2}
    for node, view in views.items():
        others = [name for name in view["missing"] if name not in hidden and name in views]
        if len(views) == 1:
            found[node]["probes"]["shared files"] = ok("sees what the login node wrote; no other node answered to compare with", **_rest(view))
        elif node in hidden:
            found[node]["probes"]["shared files"] = broken(f"what it writes is not seen by {unseen[node]} of {len(views)} nodes: not the same folder, or late")
        elif others:
            found[node]["probes"]["shared files"] = broken(f"doesn't see in time what {', '.join(others[:4])} wrote", **_rest(view))
        elif view["missing"]:
            known = len(views) - len(hidden & set(view["missing"]))
            found[node]["probes"]["shared files"] = ok(f"sees what {known} nodes wrote", **_rest(view))


def _rest(view: Verdict) -> dict[str, Any]:
    return {key: value for key, value in view.items() if key not in ("status", "detail")}


def _rates(found: Reports, name: str, unit: str) -> None:
    """Pairs without a connection blame the node that most of its partners failed with; a node whose best rate is far below the others' best is slow."""
    tried: dict[str, dict[str, float | None]] = {}
    for node, report in found.items():
        for other, rate in report["probes"].get(name, {}).get("rates", {}).items():
            if other in found:
                tried.setdefault(node, {})[other] = rate
                tried.setdefault(other, {})[node] = rate
    failed = {node: sum(rate is None for rate in rates.values()) for node, rates in tried.items()}
    culprits = {node for node, number in failed.items() if number and number > len(tried[node]) / 2}
    # Of a pair that failed both look guilty: one that works with somebody else, or has more partners to answer for it, is cleared.
    guilty = {node for node in culprits if failed[node] == max(failed[other] for other in [node, *(each for each, rate in tried[node].items() if rate is None)])}
    guilty = guilty or {node for node, number in failed.items() if number}
    for node in guilty:
        lost = [other for other, rate in tried[node].items() if rate is None]
        found[node]["probes"][name] = broken(f"no connection with {', '.join(lost[:4])} ({found[node]['probes'][name]['detail']})", rates=tried[node])
    for node in failed:
        if failed[node] and node not in guilty:
            blamed = [other for other, rate in tried[node].items() if rate is None]
            found[node]["probes"][name] = ok(f"all but {', '.join(blamed[:4])}, which others don't reach either", rates=tried[node])
    best = {node: max(rate for rate in rates.values() if rate is not None) for node, rates in tried.items() if any(rate is not None for rate in rates.values())}
    if len(best) < 3:
        return  # of two nobody can say which one is slow
    usual = statistics.median(best.values())
    for node, rate in best.items():
        if rate < SLOW_SHARE[name] * usual and node not in guilty:
            found[node]["probes"][name] = slow(f"{rate:.3g} {unit} at best, the others {usual:.3g}", rates=tried[node])


def _inside(found: Reports) -> None:
    """A node whose own GPUs reach each other far slower than those of most nodes of its group."""
    for group in {report["group"] for report in found.values()}:
        seen = {node: report["probes"]["nccl inside"] for node, report in found.items() if report["group"] == group and "gigabytes" in report["probes"].get("nccl inside", {})}
        usual = statistics.median(each["gigabytes"] for each in seen.values()) if len(seen) > 2 else 0.0
        for node, each in seen.items():
            if each["gigabytes"] < SLOW_SHARE["nccl"] * usual:
                found[node]["probes"]["nccl inside"] = slow(f"{each['gigabytes']:.3g} GB/s between its GPUs, on the other nodes {usual:.3g}", **_rest(each))


def _clocks(found: Reports) -> None:
    """A clock is compared with the median of all; what may be the measurement's own error is forgiven. Of two, nobody can say which is wrong: both are."""
    seen = {node: report["probes"]["clock"] for node, report in found.items() if "seconds" in report["probes"].get("clock", {})}
    if len(seen) == 1:
        for node in seen:
            found[node]["probes"]["clock"] = not_checked("no other node answered to compare with")
    for node, clock in seen.items():
        others = [each["seconds"] for name, each in seen.items() if name != node] if len(seen) == 2 else [each["seconds"] for each in seen.values()]
        away = clock["seconds"] - (statistics.median(others) if others else clock["seconds"])
        sure = abs(away) - max(each["bound"] for each in seen.values())
        if sure > CLOCK_SLOW_SECONDS:
            whose = "the other node's clock, one of both is wrong" if len(seen) == 2 else "most nodes' clocks"
            judge = broken if sure > CLOCK_BROKEN_SECONDS else slow
            found[node]["probes"]["clock"] = judge(f"{away:+.1f} s from {whose}: set up NTP or PTP on the node", **_rest(clock))
        elif len(seen) > 1:
            found[node]["probes"]["clock"] = ok(f"{away * 1e3:+.1f} ms from the others' clocks (within {clock['bound'] * 1e3:.1f} ms)", **_rest(clock))


def _files(found: Reports) -> None:
    """Who sees other files than most is wrong, not the many; where there is no majority nobody is."""
    seen = {node: report["probes"]["files"]["files"] for node, report in found.items() if "files" in report["probes"].get("files", {}) and report["probes"]["files"]["status"] == "ok"}
    for path in list(dict.fromkeys(path for files in seen.values() for path in files)):
        usual, number = Counter(tuple(files[path]) for files in seen.values() if path in files).most_common(1)[0]
        for node, files in seen.items():
            if path in files and tuple(files[path]) != usual and number > len(seen) / 2:
                detail = f"{path}: {_size(*files[path])}, on most nodes {_size(*usual)}"
                found[node]["probes"]["files"] = broken(detail, **_rest(found[node]["probes"]["files"]))


def _size(number: int, size: int) -> str:
    return f"{number} file{'' if number == 1 else 's'}, {size} bytes"


def _ports(found: Reports) -> None:
    """InfiniBand: a port that most nodes of the group have active, and this one doesn't."""
    for group in {report["group"] for report in found.values()}:
        have = {node: report["probes"]["infiniband"]["ports"] for node, report in found.items() if report["group"] == group and "ports" in report["probes"].get("infiniband", {})}
        for node, ports in have.items():
            off = [name for name, word in ports.items() if not word.startswith("ACTIVE") and sum(other.get(name, "").startswith("ACTIVE") for other in have.values()) > len(have) / 2]
            if off and found[node]["probes"]["infiniband"]["status"] == "ok":
                found[node]["probes"]["infiniband"] = broken(f"{', '.join(off)} not active, as on the other nodes", ports=ports)
        if len(have) > 0 and group:
            lacking = [node for node, report in found.items() if report["group"] == group and node not in have]
            for node in lacking if len(have) > len(lacking) else ():
                found[node]["probes"]["infiniband"] = broken(f"has no InfiniBand device, {len(have)} nodes of its group have")
