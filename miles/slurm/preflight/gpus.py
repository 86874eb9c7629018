"""Probes of accelerators: those that Slurm gave, the driver's word on them, the NVLink fabric, and IMEX channels."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from miles.slurm.preflight.verdict import Verdict, broken, not_checked, ok, slow

SMI_SECONDS = 30.0
CHANNELS = Path("/dev/nvidia-caps-imex-channels")
# Field of nvidia-smi, whether its value is bad, in words. A driver that doesn't know a field is asked for the others.
HEALTH: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    ("ecc.errors.uncorrected.volatile.total", lambda value: value.isdecimal() and int(value) > 0, "uncorrected memory errors since the driver was loaded"),
    ("remapped_rows.pending", lambda value: value in ("1", "Yes"), "a row of memory waits to be remapped: reset the GPU"),
    ("remapped_rows.failure", lambda value: value in ("1", "Yes"), "a row of memory could not be remapped"),
)  # fmt: skip
SLOWED = ("clocks_event_reasons.hw_slowdown", "clocks_event_reasons.hw_thermal_slowdown", "clocks_event_reasons.hw_power_brake_slowdown")


def granted(wanted: int, counts: bool) -> Verdict:
    """Whether Slurm gave this step as many as a node has. counts: whether the group asks for GPUs at all."""
    if not counts:
        return not_checked("the group asks for no GPUs")
    given = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("SLURM_STEP_GPUS"))
    if given is None:
        return not_checked("Slurm sets no CUDA_VISIBLE_DEVICES here")
    number = len([word for word in given.split(",") if word and word != "NoDevFiles"])
    return ok(f"{number} given") if number >= wanted else broken(f"{number} GPUs given, {wanted} wanted")


def health(device: str, wanted: int) -> Verdict:
    """nvidia-smi's count and the state of each GPU."""
    if device != "cuda":
        return not_checked(f"cluster.device is {device}")
    try:
        rows = _smi("index,uuid,memory.total")
    except FileNotFoundError:
        return not_checked("nvidia-smi is not on this node")
    except (OSError, subprocess.SubprocessError) as error:
        return broken(f"nvidia-smi: {_line(error)}")
    if len(rows) < wanted:
        return broken(f"the driver shows {len(rows)} GPUs, {wanted} wanted", gpus=len(rows))
    unknown, warm = [], []
    for name, bad, words in HEALTH:
        values = _values(name)
        if values is None:
            unknown.append(name)
        elif hit := [index for index, value in enumerate(values) if bad(value)]:
            return broken(f"GPU {', '.join(map(str, hit))}: {words}", gpus=len(rows))
    for name in SLOWED:
        values = _values(name)
        if values is None:
            unknown.append(name)
        elif hit := [index for index, value in enumerate(values) if value == "Active"]:
            warm.append(f"GPU {', '.join(map(str, hit))}: {name.rpartition('.')[2].replace('_', ' ')}")
    if warm:
        return slow("; ".join(warm), gpus=len(rows))
    return ok(f"{len(rows)} GPUs" + (f"; this driver doesn't tell {', '.join(unknown)}" if unknown else ""), gpus=len(rows))


def fabric(device: str) -> Verdict:
    """The NVLink fabric's state, where nvidia-smi -q tells one."""
    if device != "cuda":
        return not_checked(f"cluster.device is {device}")
    try:
        said = _run(["nvidia-smi", "-q"])
    except FileNotFoundError:
        return not_checked("nvidia-smi is not on this node")
    except (OSError, subprocess.SubprocessError) as error:
        return broken(f"nvidia-smi -q: {_line(error)}")
    return fabric_state(said)


def fabric_state(said: str) -> Verdict:
    """Of `nvidia-smi -q`: a section Fabric a GPU with State and Status."""
    found = [(state.strip(), status.strip()) for state, status in re.findall(r"^\s+Fabric\s*\n\s+State\s*: (.+)\n\s+Status\s*: (.+)$", said, re.MULTILINE)]
    told = [(state, status) for state, status in found if state != "N/A"]
    if not told:
        return not_checked("the driver tells of no NVLink fabric")
    wrong = [f"GPU {index}: {state}, {status}" for index, (state, status) in enumerate(found) if state != "N/A" and (state, status) != ("Completed", "Success")]
    return broken("; ".join(wrong) + " (fabric manager, IMEX)") if wrong else ok(f"completed on {len(told)} GPUs")


def imex(wanted: bool, folder: Path = CHANNELS) -> Verdict:
    """Whether the job has an IMEX channel, which NVLink to other nodes' GPUs needs. wanted: NCCL is told to use it."""
    channels = sorted(folder.glob("channel*")) if folder.is_dir() else []
    if channels:
        refused = [str(path) for path in channels if not os.access(path, os.R_OK | os.W_OK)]
        return broken(f"{refused[0]}: not permitted") if refused else ok(f"{len(channels)} channel{'s' if len(channels) > 1 else ''}")
    if wanted:
        return broken(f"NCCL_MNNVL_ENABLE is set, but {folder} has no channel: ask the cluster's operators, or set it to 0")
    return not_checked(f"no {folder}, and NCCL_MNNVL_ENABLE isn't set")


def _values(field: str) -> list[str] | None:
    """A field of every GPU; None where this driver doesn't tell."""
    try:
        values = [row[0] for row in _smi(field)]
    except (OSError, subprocess.SubprocessError):
        return None
    return None if all(value in ("[N/A]", "N/A", "[Not Supported]") for value in values) else values


def _smi(fields: str) -> list[list[str]]:
    said = _run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    return [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.strip()]


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SMI_SECONDS, check=True).stdout


def _line(error: Exception) -> str:
    said = (getattr(error, "stdout", "") or getattr(error, "stderr", "") or str(error)).strip().splitlines()
    return said[-1] if said else str(error)
