"""A run on a disk of its own that is filled at random moments: `python full_disk.py FOLDER RATE SEED MOST`, in a mount namespace.

RATE: how often it is filled [1/s]. Prints one JSON object a launch, and leaves a copy of the finished run in FOLDER/copy.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import shared

SIZE = "32m"


def fill(disk: Path, end: threading.Event) -> None:
    """Take all room, and what becomes free later, until the end."""
    with (disk / "filler").open("wb", buffering=0) as file:
        while not end.wait(0.002):
            room = os.statvfs(disk)
            try:
                file.write(bytes(max(1, room.f_bavail * room.f_bsize)))
            except OSError:  # full, which is what we want
                continue


def launch(folder: Path, moment: float | None) -> dict[str, object]:
    """One `miles-submit run`; the disk is full from `moment` [s] on."""
    disk, began = folder / "disk", time.monotonic()
    command = [sys.executable, "-m", "miles.cli", "run", *shared.words(), "--run-dir", str(disk / "run")]
    end = threading.Event()
    filler = threading.Thread(target=fill, args=(disk, end))
    with (folder / "launcher.err").open("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "NO_COLOR": "1"})
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            filler.start()
        code = process.wait(400)
        said.seek(0)
        text = said.read()
    filled = filler.ident is not None
    if filled:
        end.set()
        filler.join()
        (disk / "filler").unlink()
    steps = len((disk / "run/metrics.jsonl").read_text().splitlines()) if (disk / "run/metrics.jsonl").exists() else 0
    return {"code": code, "filled": filled, "lines": text.splitlines(), "lines_of_metrics": steps, "moment": moment, "seconds": time.monotonic() - began}


def main(folder: Path, rate: float, seed: str, most: int) -> None:
    rng = random.Random(seed)
    (folder / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "small", str(folder / "disk")], check=True)
    stops = 0
    while True:
        ended = launch(folder, rng.expovariate(rate) if stops < most else None)
        print(json.dumps(ended), flush=True)
        if ended["code"] != 78:
            break
        stops += 1
    shutil.copytree(folder / "disk/run", folder / "copy", symlinks=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
