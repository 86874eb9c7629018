"""Files of a conversion: what several ranks and later attempts may take for whole, Ctrl-C, and how many files are open."""

import gc
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from convert_models import write_model

from miles.config.exits import AGAIN, UserError
from miles.convert import mapped, units
from miles.convert.hf_to_torch_dist import hf_to_torch_dist
from miles.convert.torch_dist_to_hf import torch_dist_to_hf
from miles.convert.units import Rank, here
from miles.convert.verify import verify

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr("miles.convert.conversion.CHUNK_BYTES", 3000)
    monkeypatch.setattr("miles.convert.conversion.FILE_BYTES", 9000)


@pytest.fixture
def interrupted(tmp_path, small_files, monkeypatch):
    """A conversion whose files are all recorded, stopped before its end."""
    source = write_model(tmp_path / "hf", "qwen3")
    with monkeypatch.context() as patched:
        patched.setattr("miles.convert.conversion.Conversion.finish", lambda *_: (_ for _ in ()).throw(OSError("the plug")))
        with pytest.raises(OSError, match="the plug"):
            hf_to_torch_dist(source, tmp_path / "td")
    return source, tmp_path / "td"


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_the_first_rank_does_not_finish_before_a_damaged_file_of_another_is_written_again(interrupted):
    source, target = interrupted
    flip(target / "release" / "__1_0.distcp")  # rank 1's
    first = threading.Thread(target=hf_to_torch_dist, args=(source, target, None, Rank(0, 2)))
    first.start()
    time.sleep(1.0)
    assert not (target / TRACKER).exists()
    hf_to_torch_dist(source, target, None, Rank(1, 2))
    first.join(timeout=60)
    assert (target / TRACKER).exists()
    assert verify(source, target).equal


def test_the_first_rank_vouches_for_whole_files_of_a_rank_that_comes_late(interrupted):
    source, target = interrupted
    hf_to_torch_dist(source, target, None, Rank(0, 2))
    assert hf_to_torch_dist(source, target, None, Rank(1, 2)).resumed_files
    assert verify(source, target).equal


@pytest.mark.parametrize("damage", [flip, lambda file: file.unlink(), lambda file: file.write_bytes(b"")], ids=["bit", "gone", "empty"])
def test_a_finished_conversion_that_has_changed_is_not_called_finished(tmp_path, small_files, damage):
    source = write_model(tmp_path / "hf", "qwen3")
    report = hf_to_torch_dist(source, tmp_path / "td")
    assert hf_to_torch_dist(source, tmp_path / "td").resumed_files == report.files
    damage(tmp_path / "td" / "release" / "__2_0.distcp")
    with pytest.raises(UserError, match=r"__2_0\.distcp: not what was written \(1 such\); remove "):
        hf_to_torch_dist(source, tmp_path / "td")


def test_nothing_of_the_records_is_open_when_they_are_removed(tmp_path, monkeypatch):
    """On NFS an open file would keep the folder alive, and a finished conversion would fail."""
    held, plain = [], shutil.rmtree

    def remove(folder, **how):
        held.extend(line for line in open_files() if str(folder) in line)
        plain(folder, **how)

    monkeypatch.setattr(units.shutil, "rmtree", remove)
    hf_to_torch_dist(write_model(tmp_path / "hf", "qwen3"), tmp_path / "td")
    assert held == []
    assert not (tmp_path / "td" / "release" / ".convert").exists()


def open_files():
    from pathlib import Path

    return [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


def test_a_process_has_mpis_place_before_that_of_the_step_it_was_started_from(monkeypatch):
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert here(3) == Rank(0, 1, 3)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert here(3) == Rank(0, 1, 3), "a batch script of a job with four tasks is one process"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert here(3) == Rank(2, 4, 3)
    monkeypatch.setenv("PMI_RANK", "5")
    monkeypatch.setenv("PMI_SIZE", "8")
    assert here(3) == Rank(5, 8, 3)


def test_a_checkpoint_of_more_files_than_a_process_may_open(tmp_path, small_files, monkeypatch):
    monkeypatch.setattr(mapped, "KEPT", 4)
    source = write_model(tmp_path / "hf", "llama")
    assert hf_to_torch_dist(source, tmp_path / "td").files > 16
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()  # what earlier tests left open is not counted
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(open_files()) + 28, hard))  # two a file: 34 without a bound
    try:
        torch_dist_to_hf(tmp_path / "td", tmp_path / "back")
        gc.collect()
        assert verify(tmp_path / "back", tmp_path / "td").equal
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


SLOW = """
import sys, time
import miles.convert.conversion as plan
from miles.convert.command import run
from miles.convert.hf_to_torch_dist import hf_to_torch_dist
from miles.convert.output import Output
from miles.convert.units import Rank
plan.CHUNK_BYTES, plan.FILE_BYTES = 3000, 9000
plain = Output.finish
def finish(self):
    print("file", flush=True); time.sleep(0.3); plain(self)
Output.finish = finish
run(lambda: hf_to_torch_dist(sys.argv[1], sys.argv[2], None, Rank(workers=2)) and 0)
"""


def test_ctrl_c_ends_a_conversion_at_once_and_the_same_command_goes_on(tmp_path, small_files):
    source = write_model(tmp_path / "hf", "qwen3")
    command = [sys.executable, "-c", SLOW, str(source), str(tmp_path / "td")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for _ in range(4):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == AGAIN
    assert err == f"again: {tmp_path}/td/release: stopped; the same command goes on, files that are finished are kept\n"
    assert len(out.splitlines()) <= 2, "no file is begun after it"
    assert not (tmp_path / "td" / TRACKER).exists()
    report = hf_to_torch_dist(source, tmp_path / "td")
    assert 2 <= report.resumed_files < report.files
    assert verify(source, tmp_path / "td").equal


def test_a_resumed_way_back_may_name_the_same_folder_otherwise(tmp_path, monkeypatch):
    hf_to_torch_dist(write_model(tmp_path / "hf", "qwen3"), tmp_path / "td")
    monkeypatch.chdir(tmp_path)
    torch_dist_to_hf("td", "back")
    assert torch_dist_to_hf(tmp_path / "td", tmp_path / "back").resumed_files == 1


