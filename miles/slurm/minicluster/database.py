"""Accounting of a private cluster: its own MariaDB, reached by a socket alone, and what sacctmgr puts in."""

from __future__ import annotations

import os
import platform
import pwd
import subprocess
from pathlib import Path

from miles.slurm.minicluster.folder import ClusterError
from miles.slurm.minicluster.packages import Programs

FOLDER = "db"  # the owner's alone: the database asks for no password
USER = "slurm"
NAME = "slurm_acct_db"
ACCOUNTS = ("research", "infra")
QOS = {"urgent": 1000, "scavenge": 0}  # name: priority; `normal` is Slurm's own


def me() -> str:
    """The user who runs the cluster; his number where he has no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def prepare(folder: Path, programs: Programs) -> None:
    """Make an empty database."""
    place = folder / FOLDER
    place.mkdir(mode=0o700)
    # One statement a line, or mariadbd reads the second as part of the first.
    (place / "init.sql").write_text(f"CREATE DATABASE {NAME};\nCREATE USER '{USER}'@'localhost';\nGRANT ALL ON {NAME}.* TO '{USER}'@'localhost';\n")
    made = subprocess.run(
        [programs["mariadb-install-db"], "--no-defaults", f"--datadir={place}/data", f"--user={me()}", "--auth-root-authentication-method=normal", "--skip-test-db"],
        capture_output=True, text=True, env=os.environ | without_sync(),
    )  # fmt: skip
    if made.returncode:
        raise ClusterError(f"mariadb-install-db failed: {made.stdout}{made.stderr}")


def without_sync() -> dict[str, str]:
    """Variables that make fsync do nothing, where Debian's libeatmydata1 is installed: hundreds of them make and fill the tables."""
    found = sorted(Path("/usr/lib").glob(f"{platform.machine()}-linux-gnu/libeatmydata.so*"))
    return {"LD_PRELOAD": str(found[0])} if found else {}


def command(folder: Path, programs: Programs) -> list[str]:
    """mariadbd without a port; nothing of it need survive a crash."""
    place = folder / FOLDER
    return [
        programs["mariadbd"], "--no-defaults", f"--datadir={place}/data", f"--socket={socket(folder)}", f"--pid-file={place}/pid", f"--user={me()}",
        "--skip-networking", f"--init-file={place}/init.sql", "--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900", "--skip-log-bin",
    ]  # fmt: skip


def socket(folder: Path) -> Path:
    """Where mariadbd answers; for MYSQL_UNIX_PORT."""
    return folder / FOLDER / "s"


def account_commands() -> list[list[str]]:
    """sacctmgr calls that make the accounts, the qos, and the user in all of them."""
    accounts, qos = ",".join(ACCOUNTS), ",".join(["normal", *QOS])
    return [
        *(["sacctmgr", "-i", "add", "qos", name, f"priority={priority}"] for name, priority in QOS.items()),
        ["sacctmgr", "-i", "add", "account", accounts, f"qos={qos}"],
        ["sacctmgr", "-i", "add", "user", me(), f"account={accounts}", f"defaultaccount={ACCOUNTS[0]}", f"qos={qos}"],
    ]
