"""Two attempts alive at once, and writers killed at random moments: real processes, real signals."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from miles.data.store.epoch import Fence, new_epoch
from miles.data.store.files import seal_bytes
from miles.data.store.journal import read_journal
from miles.data.store.shard import open_shard

OLD_ATTEMPT = """
import sys
from pathlib import Path
from miles.data.store.epoch import Fence, Fenced
from miles.data.store.files import seal_bytes
from miles.data.store.run_dir import RunDir
run_dir = RunDir(Path(sys.argv[1]))
fence = Fence(run_dir, int(sys.argv[2]))
try:
    while True:
        seal_bytes(run_dir.path / "file", b"old", fence)
except Fenced as fenced:
    sys.exit(fenced.exit_code)
"""

WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from conftest import _make
from miles.data.store.journal import Journal
from miles.data.store.shard import write_shard
folder = Path(sys.argv[1])
with Journal(folder / "w.1.log") as journal:
    for draw in range(10_000):
        group = [_make(draw, index, 5, 20_000) for index in range(2)]
        journal.append(group, {"step": draw})
        write_shard(folder / f"rollout.{draw}.h5", group)
        print(draw, flush=True)
"""


def wait_for(path, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.002)


@pytest.mark.parametrize("seed", range(4))
def test_stopped_attempt_writes_nothing_after_the_newer_ones_first_seal(run_dir, seed):
    epoch = new_epoch(run_dir)
    process = subprocess.Popen([sys.executable, "-c", OLD_ATTEMPT, str(run_dir.path), str(epoch)])
    try:
        wait_for(run_dir.path / "file")
        time.sleep(random.Random(seed).uniform(0, 0.02))
        os.kill(process.pid, signal.SIGSTOP)
        fence = Fence(run_dir, new_epoch(run_dir))
        seal_bytes(run_dir.path / "file", b"new", fence)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(60) == 75
    finally:
        process.kill()
        process.wait()
    assert (run_dir.path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("seed", range(3))
def test_killed_writer_leaves_whole_files_and_all_it_reported(tmp_path, seed):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True)
    wait_for(tmp_path / "rollout.3.h5")
    time.sleep(random.Random(seed).uniform(0, 0.1))
    process.kill()
    reported = [int(line) for line in process.communicate()[0].split()]
    found = [context["step"] for context, _ in read_journal(tmp_path / "w.1.log")]
    assert found == list(range(len(found)))
    assert len(found) >= len(reported) >= 3
    shards = sorted(tmp_path.glob("*.h5"))
    assert len(reported) <= len(shards) <= len(found)
    for path in shards:
        with open_shard(path) as shard:
            assert [len(sample.token_id) for sample in shard.samples()] == [20_005, 20_005]
