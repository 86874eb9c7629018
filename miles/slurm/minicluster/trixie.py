"""Slurm of the next Debian in a folder, beside the machine's own: no root, no chroot, no mount. `python -m miles.slurm.minicluster.trixie [FOLDER]`.

The packages are downloaded (debootstrap finds and checks them) and unpacked, and the programs are told to use the libraries unpacked with
them, down to the C library and its loader. So they run on the machine's own file system, and the tasks that they start are ordinary processes of it.
"""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

from miles.config.exits import WRONG, UserError
from miles.slurm.minicluster.packages import COMPLETE, INSTALL, complete, default_folder

VERSION, SUITE = "24.11", "trixie"
INCLUDE = ("slurmctld", "slurmd", "slurm-client", "slurmdbd", "slurm-wlm-mysql-plugin")
DAEMONS = ("slurmctld", "slurmd", "slurmstepd", "slurmdbd")
COMMANDS = ("sacct", "sacctmgr", "salloc", "sattach", "sbatch", "scancel", "scontrol", "sdiag", "sinfo", "sprio", "squeue", "sreport", "srun", "sshare", "sstat", "strigger")
LIBRARIES = ("lib", "slurm", "zlib")  # beginnings of the names of packages that have any
BUILDING = "building"  # marks a folder as ours before it is complete
DOWNLOADS, PAUSE_SECONDS = 3, 5.0  # tries
TOOLS = ("debootstrap", "patchelf", "dpkg-deb")


def build(folder: Path) -> bool:
    """Make the folder unless it is complete; whether it was made. UserError when a tool is missing or the folder holds something else."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if complete(folder):
            return False
        if missing := [tool for tool in TOOLS if shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]:
            raise UserError(f"not installed: {', '.join(missing)}; as root: {INSTALL} debootstrap patchelf")
        if folder.exists() and any(folder.iterdir()) and not any((folder / name).exists() for name in (BUILDING, COMPLETE)):
            raise UserError(f"{folder}: is not empty; choose a new folder")
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        (folder / BUILDING).touch()
        _unpack(folder)
        _lead_to_libraries(folder)
        found = _run([str(folder / "sbin" / "slurmctld"), "-V"]).split()[-1]
        if not found.startswith(VERSION):
            raise UserError(f"Debian {SUITE} has Slurm {found} now, not {VERSION}")
        (folder / COMPLETE).write_text(json.dumps({"version": found, "folder": str(folder)}))
        (folder / BUILDING).unlink()
        return True


def _unpack(folder: Path) -> None:
    """Download, and keep of the packages the libraries, Slurm's plugins, daemons and commands."""
    download, tree = folder / "download", folder / "tree"
    for left in reversed(range(DOWNLOADS)):
        try:
            _run(["debootstrap", "--variant=minbase", "--download-only", f"--include={','.join(INCLUDE)}", SUITE, str(download)])
            break
        except UserError:  # a mirror may stumble over one of hundreds of files
            if not left:
                raise
            shutil.rmtree(download, ignore_errors=True)
            time.sleep(PAUSE_SECONDS)
    for package in sorted((download / "var" / "cache" / "apt" / "archives").glob("*.deb")):
        if package.name.startswith(LIBRARIES):
            _run(["dpkg-deb", "--extract", str(package), str(tree)])
    libraries = tree / "usr" / "lib" / f"{platform.machine()}-linux-gnu"
    (libraries / "slurm-wlm").rename(folder / "plugins")
    libraries.rename(folder / "lib")
    for kind, names in (("sbin", DAEMONS), ("bin", COMMANDS)):
        (folder / kind).mkdir()
        for name in names:
            plain = tree / "usr" / kind / name
            found = plain if plain.is_file() else plain.with_name(f"{name}-wlm")
            found.rename(folder / kind / name)
    shutil.rmtree(download)
    shutil.rmtree(tree)


def _lead_to_libraries(folder: Path) -> None:
    """Write the places of loader and libraries into Slurm's files. RPATH and not RUNPATH: it also holds for what the libraries load."""
    where = f"{folder}/plugins:{folder}/lib"
    programs = [*(folder / "sbin").iterdir(), *(folder / "bin").iterdir()]
    loader = Path(_run(["patchelf", "--print-interpreter", str(programs[0])]).strip()).name
    for program in programs:
        _run(["patchelf", "--set-interpreter", f"{folder}/lib/{loader}", "--force-rpath", "--set-rpath", where, str(program)])
    for plugin in (folder / "plugins").glob("*.so*"):
        if not plugin.is_symlink():
            _run(["patchelf", "--force-rpath", "--set-rpath", where, str(plugin)])


def _run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(words)}: exit code {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def main() -> None:
    """Build, and say so."""
    folder = (Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder(VERSION)).absolute()
    began = time.monotonic()
    try:
        made = build(folder)
    except UserError as error:
        print(f"Slurm {VERSION}: {error}", file=sys.stderr)
        sys.exit(WRONG)
    if made:
        print(f"Slurm {VERSION} in {folder}: unpacked in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
