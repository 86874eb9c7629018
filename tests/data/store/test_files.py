import errno
import json
import resource
import signal
import subprocess
import sys

import pytest
import xxhash

from miles.data.store.epoch import Fence, Fenced, new_epoch
from miles.data.store.files import (
    Damaged,
    checksum,
    metadata_text,
    read_json,
    schema_kind,
    seal,
    seal_bytes,
    seal_json,
    verify,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_seal_says_what_is_on_disk(tmp_path):
    content = bytes(range(256)) * 40_000  # larger than one read block
    sealed = seal_bytes(tmp_path / "deep" / "file", content)
    assert (tmp_path / "deep" / "file").read_bytes() == content
    assert (sealed.name, sealed.bytes, sealed.xxh3) == ("file", len(content), f"{xxhash.xxh3_64_intdigest(content):016x}")
    verify(tmp_path / "deep" / "file", sealed.bytes, sealed.xxh3)


def test_published_checksum_of_nothing(tmp_path):
    (tmp_path / "empty").touch()
    assert checksum(tmp_path / "empty") == "2d06800538d394c2"  # XXH3_64bits of no bytes with seed 0, from xxHash's own test vectors


def test_failing_writer_leaves_the_old_file_and_no_other(tmp_path):
    seal_bytes(tmp_path / "file", b"old")

    def write(path):
        path.write_bytes(b"half")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        seal(tmp_path / "file", write)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("flip", [0, 7, 99])
def test_verify_names_the_file_with_one_flipped_bit(tmp_path, flip):
    sealed = seal_bytes(tmp_path / "shard.h5", bytes(100))
    content = bytearray(100)
    content[flip] ^= 1
    (tmp_path / "shard.h5").write_bytes(content)
    with pytest.raises(Damaged, match=rf"shard\.h5: xxh3 {sealed.xxh3} expected, {xxhash.xxh3_64_hexdigest(bytes(content))} found"):
        verify(tmp_path / "shard.h5", sealed.bytes, sealed.xxh3)


def test_verify_tells_size_and_absence(tmp_path):
    sealed = seal_bytes(tmp_path / "a", b"12345")
    (tmp_path / "a").write_bytes(b"1234")
    with pytest.raises(Damaged, match="a: 5 bytes expected, 4 found"):
        verify(tmp_path / "a", sealed.bytes, sealed.xxh3)
    (tmp_path / "a").unlink()
    with pytest.raises(Damaged, match="a: missing; 5 bytes"):
        verify(tmp_path / "a", sealed.bytes, sealed.xxh3)


def test_full_disk_passes_as_oserror_and_leaves_nothing(tmp_path):
    """The largest file allowed stands in for the disk's end: the same failing write(2), in any container."""
    seal_bytes(tmp_path / "file", b"old")
    program = f"""
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, {str(__file__).rsplit("/", 1)[0]!r})
from conftest import _make
from miles.data.store.files import seal_bytes
from miles.data.store.journal import Journal, read_journal
from miles.data.store.metrics import Metrics, read_metrics
from miles.data.store.shard import write_shard
folder = Path({str(tmp_path)!r})
big = [_make(0, 0, 1, 200_000)]
journal = Journal(folder / "w.1.log")
journal.append([_make(1, 0)], {{}})
Metrics(folder / "metrics.jsonl").append({{"step": 0, "kind": "sft"}})
tries = [
    lambda: seal_bytes(folder / "file", bytes(200_000)),
    lambda: write_shard(folder / "file", big),
    lambda: journal.append(big, {{}}),
    lambda: Metrics(folder / "metrics.jsonl").append({{"step": 1, "kind": "sft", "text": "x" * 200_000}}),
]
for attempt in tries:
    try:
        attempt()
        print("no error")
    except OSError as error:
        print(error.errno)
journal.append([_make(2, 0)], {{}})
Metrics(folder / "metrics.jsonl").append({{"step": 2, "kind": "sft"}})
print([group[0].draw for _, group in read_journal(folder / "w.1.log")], [line["step"] for line in read_metrics(folder / "metrics.jsonl")])
"""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run([sys.executable, "-c", program], preexec_fn=limit, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(errno.EFBIG)] * 4 + ["[1, 2] [0, 2]"], done.stderr
    assert names(tmp_path) == ["file", "metrics.jsonl", "w.1.log"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_fenced_attempt_seals_nothing(run_dir):
    old = Fence(run_dir, new_epoch(run_dir))
    seal_bytes(run_dir.path / "file", b"old", old)
    new_epoch(run_dir)
    with pytest.raises(Fenced, match=r"attempt 1 .* superseded by attempt 2"):
        seal_bytes(run_dir.path / "file", b"too late", old)
    assert (run_dir.path / "file").read_bytes() == b"old"


def test_attempt_stopped_between_check_and_rename_seals_nothing(run_dir):
    """A newer attempt begins while the writer is at work: the kernel refuses the rename, no check is needed."""
    old = Fence(run_dir, new_epoch(run_dir))
    old.check = lambda: None  # as if stopped just after each check

    def write(path):
        path.write_bytes(b"late")
        new_epoch(run_dir)

    with pytest.raises(FileNotFoundError):
        seal(run_dir.path / "file", write, old)
    assert not (run_dir.path / "file").exists()


def test_json_round_trip_and_damage(tmp_path):
    seal_json(tmp_path / "x.json", {"b": 1, "a": ["é"]})
    assert list(read_json(tmp_path / "x.json")) == ["b", "a"]
    (tmp_path / "x.json").write_text('{"b": ')
    with pytest.raises(Damaged, match=r"x\.json: not JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("found", "message"),
    [("miles.rollout/2", "is miles.rollout/2, and this miles reads miles.rollout/1"), ("miles.train/1", "is a miles.train/1 file"), (None, "no schema"), (3, "no schema")],
)
def test_schema_is_refused_by_name(found, message):
    with pytest.raises(ValueError, match=f"^f.h5: .*{message}"):
        schema_kind(found, "miles.rollout/1", "f.h5")
    schema_kind("miles.rollout/1.4", "miles.rollout/1", "f.h5")  # a minor number is read


def test_metadata_text_is_ascii_and_names_what_cannot_be_written():
    text = metadata_text({"k": "é\ud800\0"})
    assert text.isascii()
    assert json.loads(text) == {"k": "é\ud800\0"}
    with pytest.raises(ValueError, match="a set can't be written"):
        metadata_text({"k": {1}})
