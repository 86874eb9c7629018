"""The diagnosers: each looks at the evidence and says what happened, if that is what it knows. Pure. A new one is added to ALL."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from miles.config.exits import AGAIN, FULL_BYTES, OK, WRONG
from miles.slurm.doctor.evidence import Diagnosis, Evidence, Line
from miles.slurm.doctor.signs import SIGNS
from miles.slurm.states import FORGOTTEN

RESUME = "`miles-submit resume RUN` goes on from the last good checkpoint"
BEGIN = "`miles-submit resume RUN` begins again (no checkpoint was saved yet)"
ERROR = re.compile(r"^(\w+(\.\w+)*)?(Error|Exception|Interrupt|Exit)\b.*")
FAILED_NODE = re.compile(r"Node failure on (\S+)")
Diagnoser = Callable[[Evidence], "Diagnosis | None"]


def _word(seen: Evidence) -> Line:
    """What the newest attempt's exit.json says."""
    return Line(seen.last.where if seen.last else "", str(seen.outcome.get("reason", "")))


def _slurm(seen: Evidence, about: str = "") -> Line:
    job = seen.job
    assert job is not None
    code = f" (exit code {job.exit_code})" if job.exit_code else ""
    state, reason = ("ended" if job.meant else job.state.lower().replace("_", " ")), job.meant or job.reason
    return Line(f"Slurm, job {job.job_id}", about or f"{state}{code}{': ' + reason if reason else ''}")


def _node(seen: Evidence) -> str | None:
    """The node that the newest attempt's outcome names; a role's home where it names none."""
    node = seen.outcome.get("node")
    return str(node) if node else seen.homes.get(f"{seen.outcome.get('role')}.{seen.outcome.get('rank')}")


def finished(seen: Evidence) -> Diagnosis | None:
    """Not dead at all."""
    if seen.outcome.get("code") != OK or (seen.job is not None and not seen.job.over):
        return None
    return Diagnosis("finished", 100, "the run's last attempt ended well", "nothing; its report: `miles-submit report RUN`", (_word(seen),))


def alive(seen: Evidence) -> Diagnosis | None:
    """A job of it runs or begins, or its own machine runs it."""
    if seen.lives and seen.last is not None:
        where = Line(f"attempts/{seen.last.epoch:06d}/service.json", "its service answers, or its launcher runs on this machine")
        return Diagnosis("alive", 99, f"attempt {seen.last.epoch} goes on", "nothing yet; `miles-submit status RUN`", (where,))
    if seen.job is None or seen.job.over or seen.job.state == "PENDING":
        return None
    return Diagnosis("alive", 99, f"job {seen.job.job_id} is {seen.job.state.lower()}: the run goes on", "nothing yet; `miles-submit status RUN`", (_slurm(seen),))


def pending(seen: Evidence) -> Diagnosis | None:
    """It waits in the queue: for the first time, or again."""
    if seen.job is None or seen.job.state != "PENDING":
        return None
    job = seen.job
    never = "never started" if not seen.attempts else "waits to go on"
    hopeless = any(word in job.reason for word in ("never starts", "held", "more time", "more nodes", "unknown", "down", "closed", "may not use", "no nodes are", "reservation is gone"))
    mend = "mend what the reason names: `miles-submit cancel RUN`, then `miles-submit resume RUN` with other cluster.groups settings" if hopeless else "wait; `miles-submit status RUN` says when Slurm expects it to start"
    return Diagnosis("pending", 98, f"job {job.job_id} {never}: {job.reason or 'it waits in the queue'}", mend, (_slurm(seen),))


def cancelled(seen: Evidence) -> Diagnosis | None:
    """Somebody ended it."""
    job = seen.job
    if job is not None and int(job.job_id) in seen.cancelled:
        return Diagnosis("cancelled", 95, f"job {job.job_id} was cancelled with `miles-submit cancel`", RESUME, (Line("slurm/cancelled.json", str(sorted(seen.cancelled))), _slurm(seen)))
    if job is not None and job.state == "CANCELLED":
        return Diagnosis("cancelled", 93, f"job {job.job_id} was cancelled with scancel, by its user or an administrator", RESUME, (_slurm(seen),))
    return None


ASKERS = {"user": "its user", "slurm": "Slurm (its time limit came near, it was preempted, or it was requeued)"}


def stopped(seen: Evidence) -> Diagnosis | None:
    """The newest attempt was asked to stop: what was killed then was killed for that."""
    if not (seen.outcome.get("stopped") or (seen.last and seen.last.stop_by)) or seen.outcome.get("code") == OK or seen.last is None:
        return None
    by = ASKERS.get(seen.last.stop_by, "the launcher" if not seen.last.stop_by else f"placement jobs: {seen.last.stop_by}")
    alone = "cluster.slurm.requeue is none, so no job goes on by itself: " if seen.requeue == "none" and seen.last.stop_by == "slurm" else ""
    later = " It was to go on in a later job; if none waits or runs," if seen.outcome.get("goes_on") else ""
    lines = (*((Line(f"attempts/{seen.last.epoch:06d}/stop.json", f"by {seen.last.stop_by}"),) if seen.last.stop_by else ()), _word(seen))
    return Diagnosis("stopped", 83, f"attempt {seen.last.epoch} was asked to stop by {by}", f"{alone}{later} {RESUME}".strip(), lines)


def wrong(seen: Evidence) -> Diagnosis | None:
    """A user's mistake: the run's own word says it all."""
    if seen.outcome.get("code") == WRONG and "disk full" not in str(seen.outcome.get("reason")):
        return Diagnosis("wrong", 92, str(seen.outcome.get("reason")), "mend what the line names, then run the same command again; nothing is tried again by itself", (_word(seen),), _node(seen))
    told = next((line for line in reversed(seen.logs) if line.where.startswith("slurm/") and re.search(r" error: ", line.text)), None)
    if told is not None and seen.job is not None and seen.job.exit_code == WRONG and not seen.outcome:
        return Diagnosis("wrong", 92, told.text.partition(" error: ")[2], "mend what the line names, then run the same command again", (told, _slurm(seen)))
    return None


def disk(seen: Evidence) -> Diagnosis | None:
    """Its own word, or a disk without room now."""
    mend = f"free some space, or keep less (checkpoint.retain, checkpoint.retain_batches); {RESUME}"
    if "disk full" in str(seen.outcome.get("reason")):
        return Diagnosis("disk_full", 94, str(seen.outcome["reason"]).partition(": ")[0], mend, (_word(seen),), None)
    if seen.free_bytes is not None and seen.free_bytes < FULL_BYTES and seen.outcome.get("code") != OK:
        return Diagnosis("disk_full", 90, f"the disk of the run directory is full: {seen.free_bytes} bytes left", mend, (Line(seen.run, f"{seen.free_bytes} bytes available"),))
    return None


def hung(seen: Evidence) -> Diagnosis | None:
    """The watchdog's word names who held the others up."""
    for where, fault in reversed(seen.last.faults if seen.last else ()):
        if fault.get("code") == AGAIN:
            node = str(fault["node"]) if fault.get("node") else _node(seen)
            line = Line(where, str(fault.get("message")))
            stacks = [each for each in seen.logs if "the run hangs; the stacks of all threads" in each.text][:2]
            mend = f"the stacks are in the trainer's logs (each after `the run hangs`); `miles-submit preflight RUN` tests the node; {RESUME}"
            return Diagnosis("hung", 91, str(fault.get("message")), mend, (line, *stacks), node)
    if seen.outcome.get("told") and seen.outcome.get("code") == AGAIN:
        return Diagnosis("hung", 91, str(seen.outcome.get("reason")), RESUME, (_word(seen),), _node(seen))
    return None


def node_failed(seen: Evidence) -> Diagnosis | None:
    """Slurm holds a node for broken, or ended the job for it."""
    if seen.outcome.get("code") == OK:
        return None
    if seen.broken_nodes:
        node, why = next(iter(sorted(seen.broken_nodes.items())))
        more = f" (and {len(seen.broken_nodes) - 1} more)" if len(seen.broken_nodes) > 1 else ""
        return Diagnosis("node_failed", 89, f"node {node}{more} failed: {why}", f"{RESUME}; failed nodes are left out", tuple(Line(f"scontrol show node {name}", text) for name, text in sorted(seen.broken_nodes.items())), node)
    if seen.job is not None and seen.job.state in ("NODE_FAIL", "BOOT_FAIL"):
        told = next(((line, match[1]) for line in seen.logs if (match := FAILED_NODE.search(line.text))), None)
        which, mend = (f"node {told[1]}", f"{RESUME}; cluster.groups.all.exclude={told[1]} leaves the node out") if told else ("a node", f"{RESUME}; cluster.groups.all.exclude=NODE leaves a node out")
        return Diagnosis("node_failed", 87, f"{which} of job {seen.job.job_id} failed", mend, (_slurm(seen), *((told[0],) if told else ())), told[1] if told else None)
    return None


STATES = {
    "TIMEOUT": ("time_limit", 85, "reached its time limit before it could save and requeue itself", f"ask for more time (cluster.groups.all.time) or save sooner (cluster.slurm.lead_seconds); {RESUME}"),
    "DEADLINE": ("time_limit", 85, "reached its deadline", RESUME),
    "PREEMPTED": ("preempted", 85, "was preempted by another job and not requeued", f"{RESUME}; a qos that isn't preempted spares you that"),
    "OUT_OF_MEMORY": ("memory", 88, "used more main memory than it had asked for", f"ask for more (cluster.groups.all.mem; 0 is all of a node's); {RESUME}"),
}


def job_state(seen: Evidence) -> Diagnosis | None:
    """What Slurm itself ended the job for."""
    if seen.job is None or seen.outcome.get("code") == OK:
        return None
    ended = next((state for state in (seen.job.state, *(part.state for part in seen.job.components)) if state in STATES), None)
    if ended is None:
        return None
    cause, weight, happened, mend = STATES[ended]
    nodes = [part.nodes for part in seen.job.components if part.state == ended and part.nodes]
    return Diagnosis(cause, weight, f"job {seen.job.job_id} {happened}", mend, (_slurm(seen),), nodes[0] if ended == "OUT_OF_MEMORY" and nodes else None)


def all_signs(seen: Evidence) -> list[Diagnosis]:
    """A diagnosis for each kind of sign that the logs hold, with up to three lines of it; the first line is the earliest of its file."""
    if seen.outcome.get("code") == OK:
        return []
    found: dict[str, list[Line]] = {}
    for line in seen.logs:
        if (sign := next((sign for sign in SIGNS if sign.pattern.search(line.text)), None)) is not None:
            found.setdefault(sign.cause, []).append(line)
    by_name = {sign.cause: sign for sign in SIGNS}
    diagnoses = []
    for cause, lines in found.items():
        sign, node = by_name[cause], next((node for line in lines if (node := seen.node_of(line))), None)
        diagnoses.append(Diagnosis(cause, sign.weight, sign.happened, sign.mend, tuple(lines[:3]), node))
    return diagnoses


def killed(seen: Evidence) -> Diagnosis | None:
    """A process was killed, and it is not known by whom."""
    if not seen.outcome.get("killed"):
        return None
    mend = f"who killed it is not in the run's files: the kernel's log of the node (`dmesg`: out of memory?) or an administrator knows; {RESUME}"
    return Diagnosis("killed", 50, str(seen.outcome.get("reason")), mend, (_word(seen),), _node(seen))


def budget(seen: Evidence) -> Diagnosis | None:
    """Attempts that brought nothing, one after another."""
    line = next((line for line in reversed(seen.logs) if "gave up after" in line.text), None)
    if line is None:
        return None
    reasons = tuple(Line(each.where, str((each.outcome or {}).get("reason", "left no word"))) for each in seen.attempts[-3:])
    mend = f"mend what ended the attempts (the other findings); then {RESUME}"
    return Diagnosis("budget", 48, f"the budget of new attempts without a new step is spent (cluster.restarts: {seen.restarts})", mend, (line, *reasons))


def crashed(seen: Evidence) -> Diagnosis | None:
    """A traceback: a bug of ours, or of a function of the user's."""
    code = seen.outcome.get("code")
    if code in (None, OK, AGAIN, WRONG) and not (code is None and seen.job is not None and seen.job.exit_code not in (None, 0, AGAIN, WRONG)):
        return None
    log = f"{seen.outcome.get('role')}.{seen.outcome.get('rank')}"
    mine = [line for line in seen.logs if line.log == log] or list(seen.logs)
    error = next((line for line in reversed(mine) if ERROR.match(line.text)), None)
    if error is None:
        return None
    own = next((line for line in reversed(mine[: mine.index(error)]) if line.text.lstrip().startswith("File ") and "site-packages" not in line.text), None)
    lines = (error, *([own] if own else []), _word(seen))
    mend = "mend the function that the line names, if it is yours, then `miles-submit resume RUN`; otherwise report it with that log"
    return Diagnosis("crashed", 64, f"{seen.outcome.get('role', 'the batch process')} {seen.outcome.get('rank', '')} raised {error.text}".replace("  ", " "), mend, lines, _node(seen))


def silent(seen: Evidence) -> Diagnosis | None:
    """The newest attempt left no word, and its job is over or forgotten."""
    last = seen.last
    if last is None or last.outcome is not None or seen.lives or (seen.job is not None and not seen.job.over):
        return None
    told = (_slurm(seen),) if seen.job is not None else ()
    ended = "the launcher was killed with it, or its machine went away" if seen.job is None else "its batch process was killed, with its node or by Slurm"
    mend = f"{RESUME}; the end of the batch process's log and, on its node, slurmd's may say more"
    return Diagnosis("no_word", 30, f"attempt {last.epoch} ended without a word: {ended}", mend, (Line(last.where, "not there"), *told), last.nodes[0] if len(last.nodes) == 1 else None)


def never_started(seen: Evidence) -> Diagnosis | None:
    """Jobs that ended before any attempt."""
    if seen.attempts or seen.job is None or not seen.job.over:
        return None
    said = tuple(line for line in seen.logs if line.where.startswith("slurm/"))[-3:]
    if not said and not seen.job.nodes and seen.job.state in ("CANCELLED", FORGOTTEN):  # it was still queued, for all that is known
        return None
    where = "the last lines of its output are the evidence" if said else "it left no output: its script could not even begin (setup lines, interpreter, or the folder is not seen on its first node)"
    mend = "mend what the output says; look at cluster.slurm.python and cluster.groups.all.setup; `miles-submit preflight RUN` tests the nodes"
    return Diagnosis("never_started", 45, f"job {seen.job.job_id} ended before any attempt began, {where}", mend, (*said, _slurm(seen)))


def forgotten(seen: Evidence) -> Diagnosis | None:
    """Slurm's own records are gone."""
    if seen.job is None or seen.job.state != FORGOTTEN or seen.outcome:
        return None
    return Diagnosis("forgotten", 20, seen.job.reason, f"only the run's files are left to read; {RESUME}", (_slurm(seen, seen.job.reason),))


def not_submitted(seen: Evidence) -> Diagnosis | None:
    """Nothing has been tried."""
    if seen.attempts or seen.jobs or seen.unasked:
        return None
    return Diagnosis("not_started", 40, "the run was written but never started", "start it: `miles-submit run RUN`", (Line("slurm/job.json", "not there"),))


ALL: tuple[Diagnoser, ...] = (finished, alive, pending, cancelled, stopped, wrong, disk, hung, node_failed, job_state, killed, budget, crashed, silent, never_started, forgotten, not_submitted)


def diagnose(seen: Evidence, diagnosers: Sequence[Diagnoser] = ALL) -> list[Diagnosis]:
    """Everything that fits, the likeliest first; a cause that several know is told once, by the surest."""
    found = [each for diagnoser in diagnosers if (each := diagnoser(seen)) is not None] + all_signs(seen)
    best: dict[str, Diagnosis] = {}
    for each in sorted(found, key=lambda each: -each.weight):
        kept = best.setdefault(each.cause, each)
        if kept is not each:
            more = [line for line in each.evidence if line not in kept.evidence]
            best[each.cause] = replace(kept, evidence=(*kept.evidence, *more)[:4], node=kept.node or each.node)
    return [each if seen.saved else replace(each, mend=each.mend.replace(RESUME, BEGIN)) for each in best.values()]
