"""Many `miles-submit` commands for the price of one start: a process that has made their imports forks itself for each. `python commands.py FILE AT_ONCE`.

FILE holds a list of {folder, words}: each runs in its folder as `python -m miles.cli WORDS` would; the folder's name with .out, .err and .code
beside it has what it said and its exit code.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import sys
import threading
from pathlib import Path

# What commands import once they know that they need it; nothing that starts a thread, which a fork would lose.
LATER = ("miles.cli.check", "miles.cli.logs", "miles.cli.report", "miles.cli.run", "reasoning_gym")


def main(file: str, at_once: str) -> None:
    """Returns in this process when all have ended, and in each fork when its turn comes to be its command."""
    for name in ("miles.cli.main", *LATER):
        importlib.import_module(name)
    assert threading.active_count() == 1
    gc.freeze()  # else each fork would look through all of it at its end
    waiting, running = json.loads(Path(file).read_text()), {}
    while waiting or running:
        while waiting and len(running) < int(at_once):
            command = waiting.pop(0)
            child = os.fork()
            if not child:
                become(command["folder"], command["words"])
            running[child] = command["folder"]
        child, status = os.wait()
        Path(f"{running.pop(child)}.code").write_text(str(os.waitstatus_to_exitcode(status)))


def become(folder: str, words: list[str]) -> None:
    """Never returns."""
    os.chdir(folder)
    for number, path, flags in ((0, "/dev/null", os.O_RDONLY), (1, f"{folder}.out", os.O_WRONLY | os.O_CREAT), (2, f"{folder}.err", os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(path, flags, 0o666), number)
    sys.path[0], sys.argv[1:] = folder, words
    runpy.run_module("miles.cli", run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    main(*sys.argv[1:])
