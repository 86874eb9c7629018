"""InfiniBand and RoCE ports, as the kernel tells of them. Whether a port that is down matters is judged beside the other nodes."""

from __future__ import annotations

from pathlib import Path

from miles.slurm.preflight.verdict import Verdict, broken, not_checked, ok

DEVICES = Path("/sys/class/infiniband")


def infiniband(folder: Path = DEVICES) -> Verdict:
    """Every port's state; `ports` is by name "ACTIVE 400 Gb/sec" or the like."""
    found = {}
    for state in sorted(folder.glob("*/ports/*/state")):
        port = state.parent
        name = f"{port.parent.parent.name}/{port.name}"
        rate = (port / "rate").read_text().split("(")[0].strip() if (port / "rate").exists() else ""
        found[name] = f"{state.read_text().partition(':')[2].strip()} {rate}".strip()
    if not found:
        return not_checked(f"no device in {folder}")
    active = [name for name, word in found.items() if word.startswith("ACTIVE")]
    if not active:
        return broken(f"no port is active: {', '.join(f'{name} {word}' for name, word in found.items())}", ports=found)
    return ok(f"{len(active)} of {len(found)} ports active", ports=found)
