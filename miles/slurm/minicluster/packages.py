"""Which Slurm is here: Debian's packages of this machine, or those of a newer Debian in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from miles.config.exits import UserError

PACKAGES = "slurmctld slurmd slurm-client munge libpmix2"
DATABASE_PACKAGES = "slurmdbd slurm-wlm-mysql-plugin mariadb-server libeatmydata1"
INSTALL = "apt-get install --no-install-recommends"
COMPLETE = "complete.json"  # in the folder of another version, written last


@dataclass(frozen=True)
class Programs:
    """Where the programs of one version are."""

    version: tuple[int, int]
    found: dict[str, Path]
    commands: Path | None = None  # a folder that PATH must begin with; None for the machine's own
    plugins: Path | None = None  # None where they are compiled in
    stepd: Path | None = None

    def __getitem__(self, name: str) -> str:
        return str(self.found[name])


def find(version: str | None, accounting: bool, elsewhere: Path | None = None) -> Programs:
    """The programs of a version: the machine's own if it has that version (None: whichever it has), else those below `elsewhere` (default: `default_folder`).

    UserError, one line with the command that mends it, where something is missing.
    """
    shared = _present({"munged"}, PACKAGES) | (_present({"mariadbd", "mariadb-install-db"}, f"{PACKAGES} {DATABASE_PACKAGES}") if accounting else {})
    own = machine_version()
    wanted = _numbers(version) if version is not None else own
    if wanted is None:
        raise UserError(f"this machine has no Slurm; as root: {INSTALL} {PACKAGES}")
    if wanted == own:
        needed = {"slurmctld", "slurmd", "scontrol", "srun", *({"slurmdbd"} if accounting else set())}
        return Programs(wanted, shared | _present(needed, f"{PACKAGES} {DATABASE_PACKAGES}" if accounting else PACKAGES))
    version = f"{wanted[0]}.{wanted[1]:02}"
    tree = (elsewhere or default_folder(version)).absolute()
    if not complete(tree):
        here = f"this machine has {own[0]}.{own[1]:02}" if own else f"this machine has no Slurm: {INSTALL} {PACKAGES}"
        mend = "; make slurm-24 unpacks 24.11 into a folder" if wanted == (24, 11) else ""
        raise UserError(f"Slurm {version} is not here, {here}{mend}")
    programs = {name: tree / "sbin" / name for name in ("slurmctld", "slurmd", "slurmdbd")}
    return Programs(wanted, shared | programs, tree / "bin", tree / "plugins", tree / "sbin" / "slurmstepd")


def complete(tree: Path) -> bool:
    """Whether a version is unpacked here. The folder can't be moved: its path is written into the programs."""
    try:
        found: dict[str, str] = json.loads((tree / COMPLETE).read_text())
    except FileNotFoundError:
        return False
    return found["folder"] == str(tree)


def default_folder(version: str) -> Path:
    """Where a version that is not the machine's is unpacked."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "miles" / f"slurm-{version}"


def machine_version() -> tuple[int, int] | None:
    """(year, month) of the machine's slurmctld; None without one."""
    program = _which("slurmctld")
    if program is None:
        return None
    return _numbers(subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stdout)


def _numbers(text: str) -> tuple[int, int]:
    match = re.search(r"(\d+)\.(\d+)", text)
    if match is None:
        raise UserError(f"Slurm version {text!r}: give it like 22.05")
    return int(match[1]), int(match[2])


def _present(names: set[str], packages: str) -> dict[str, Path]:
    found = {name: _which(name) for name in names}
    missing = sorted(name for name, path in found.items() if path is None)
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}; as root: {INSTALL} {packages}")
    return {name: path for name, path in found.items() if path is not None}


def _which(name: str) -> Path | None:
    """A program; a plain user's PATH has no sbin."""
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))
    return Path(path) if path else None
