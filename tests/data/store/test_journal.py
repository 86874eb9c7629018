import os
import struct

import msgpack
import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles.data.sample import Sample, Status
from miles.data.store.files import Damaged
from miles.data.store.journal import Journal, last_good_end, read_group, read_journal, scan_journal
from miles.data.store.run_dir import journal_paths


def assert_same(found: Sample, expected: Sample) -> None:
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if isinstance(value, np.ndarray):
            assert other.dtype == value.dtype, name
            assert other.shape == value.shape, name
            assert other.tobytes() == value.tobytes(), name  # bits, NaN included
        else:
            assert other == value or (value != value and other != other), name


def draws(path):
    return [group[0].draw for _, group in read_journal(path)]


def test_every_field_comes_back(tmp_path, make_sample):
    sample = make_sample(
        2**64 - 1, 65535, 3, 4,
        seed=2**64 - 1,
        status=Status.TRUNCATED,
        reward=1 / 3,
        reward_parts={"format": 0.1, "größe": float("inf")},
        metadata={"deep": [{"k": None}], "big": 2**70, "text": "\ud800\0😀"},
        prompt="a\0b", response="\udfff", label="",
        routes=np.arange(6 * 2 * 3, dtype=np.uint16).reshape(6, 2, 3),
        kept_mass=np.linspace(0, 1, 7).astype(np.float16),
    )  # fmt: skip
    other = make_sample(1, 0, 0, 0, reward=float("nan"), runs=[], turns=[])
    with Journal(tmp_path / "w.1.log", fsync=True) as journal:
        journal.append([sample, other], {"kind": "rollout", "step": np.int64(3), "weight_checksum": "ab"})
    ((context, group),) = read_journal(tmp_path / "w.1.log")
    assert context == {"kind": "rollout", "step": 3, "weight_checksum": "ab"}
    assert_same(group[0], sample)
    assert_same(group[1], other)


def test_record_is_as_the_format_says(tmp_path, make_sample):
    """Read by hand: u32 length, u64 xxh3, msgpack, raw little-endian arrays."""
    sample = make_sample(7, 1)
    with Journal(tmp_path / "w.1.log") as journal:
        journal.append([sample], {"step": 5})
    content = (tmp_path / "w.1.log").read_bytes()
    length, digest = struct.unpack("<IQ", content[:12])
    payload = content[12:]
    assert length == len(payload)
    assert digest == xxhash.xxh3_64(payload).intdigest()
    record = msgpack.unpackb(payload)
    assert record["schema"] == "miles.journal/1"
    assert record["context"] == {"step": 5}
    dtype, shape, raw = record["group"][0]["token_id"]
    assert (dtype, shape, raw) == ("<i4", [5], sample.token_id.astype("<i4").tobytes())


def test_cut_at_every_byte_of_the_last_two_records(tmp_path, make_sample):
    path = tmp_path / "w.1.log"
    ends = [0]
    with Journal(path) as journal:
        for draw in range(4):
            journal.append([make_sample(draw, 0, 1, 2)], {})
            ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in range(ends[2], len(whole) + 1):
        path.write_bytes(whole[:cut])
        good = max(index for index, end in enumerate(ends) if end <= cut)
        assert draws(path) == list(range(good))
        assert last_good_end(path) == ends[good]


@pytest.mark.parametrize("tail", [b"\0" * 50, b"\xff" * 50, os.urandom(5), struct.pack("<IQ", 3, 1) + b"abc"], ids=["zeros", "ones", "noise", "cut"])
def test_append_after_a_torn_tail(tmp_path, make_sample, tail):
    path = tmp_path / "w.1.log"
    with Journal(path) as journal:
        journal.append([make_sample(1, 0)], {})
    with open(path, "ab") as file:
        file.write(tail)
    with Journal(path) as journal:
        journal.append([make_sample(2, 0)], {})
    assert draws(path) == [1, 2]


def test_flipped_byte_hides_no_earlier_group(tmp_path, make_sample):
    path = tmp_path / "w.1.log"
    with Journal(path) as journal:
        journal.append([make_sample(1, 0)], {})
        end = path.stat().st_size
        journal.append([make_sample(2, 0)], {})
    content = bytearray(path.read_bytes())
    content[end + 40] ^= 1
    path.write_bytes(content)
    assert draws(path) == [1]


def test_other_schema_is_refused_by_name(tmp_path):
    payload = msgpack.packb({"schema": "miles.journal/2", "context": {}, "group": []})
    (tmp_path / "w.1.log").write_bytes(struct.pack("<IQ", len(payload), xxhash.xxh3_64_intdigest(payload)) + payload)
    with pytest.raises(ValueError, match=r"w\.1\.log: is miles\.journal/2, and this miles reads miles\.journal/1"):
        list(read_journal(tmp_path / "w.1.log"))


def test_array_of_objects_is_refused(tmp_path, make_sample):
    with Journal(tmp_path / "w.1.log") as journal:
        journal.append([make_sample(1, 0)], {})
    record = msgpack.unpackb((tmp_path / "w.1.log").read_bytes()[12:])
    record["group"][0]["token_id"][0] = "|O"
    payload = msgpack.packb(record)
    (tmp_path / "x.1.log").write_bytes(struct.pack("<IQ", len(payload), xxhash.xxh3_64_intdigest(payload)) + payload)
    with pytest.raises(ValueError, match=r"an array of '\|O'"):
        list(read_journal(tmp_path / "x.1.log"))


def test_journals_in_order_of_their_epochs(tmp_path):
    for name in ("a.10.log", "b.2.log", "a.2.log", "node.domain.3.log", "notes.log"):
        (tmp_path / name).touch()
    assert [path.name for path in journal_paths(tmp_path)] == ["a.2.log", "b.2.log", "node.domain.3.log", "a.10.log"]


def test_compact_keeps_what_is_asked_and_goes_on(tmp_path, make_sample):
    path = tmp_path / "w.1.log"
    with Journal(path) as journal:
        for draw in range(6):
            journal.append([make_sample(draw, 0)], {"step": draw // 2})
        before = journal.bytes
        moved = journal.compact(lambda context, group: context["step"] == 1 and group[0].draw != 3)
        assert list(moved.values()) == [0]
        assert 0 < next(iter(moved)) < before
        assert journal.bytes < before
        journal.append([make_sample(9, 0)], {"step": 4})
    assert draws(path) == [2, 9]
    assert [each.name for each in tmp_path.iterdir()] == ["w.1.log"]


def test_a_damaged_journal_is_not_compacted(tmp_path, make_sample):
    """What stands after the bad record is good, and would be gone."""
    path = tmp_path / "w.1.log"
    with Journal(path) as journal:
        positions = [journal.append([make_sample(draw, 0)], {"step": draw}) for draw in range(4)]
        content = bytearray(path.read_bytes())
        content[positions[2] + 20] ^= 1
        path.write_bytes(content)
        with pytest.raises(Damaged, match=rf"w\.1\.log: the record at byte {positions[2]} doesn't have its checksum"):
            journal.compact(lambda context, group: context["step"] > 0)
        assert path.read_bytes() == content
        assert_same(read_group(path, positions[3])[0], make_sample(3, 0))
    assert [each.name for each in tmp_path.iterdir()] == ["w.1.log"]


def test_positions_lead_back_to_groups(tmp_path, make_sample):
    path = tmp_path / "w.1.log"
    with Journal(path) as journal:
        positions = {draw: journal.append([make_sample(draw, index) for index in range(2)], {"step": draw}) for draw in (5, 3, 4)}
        assert [(position, context["step"]) for position, context, _ in scan_journal(path)] == [(positions[draw], draw) for draw in (5, 3, 4)]
        for draw in (4, 5):
            for index, found in enumerate(read_group(path, positions[draw])):
                assert_same(found, make_sample(draw, index))
        content = bytearray(path.read_bytes())
        content[positions[3] + 20] ^= 1
        path.write_bytes(content)
        with pytest.raises(Damaged, match=rf"w\.1\.log: the record at byte {positions[3]}"):
            read_group(path, positions[3])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=4), max_size=5), cut=st.integers(0, 200))
def test_any_prefix_is_valid(tmp_path, make_sample, lengths, cut):
    path = tmp_path / "w.1.log"
    path.unlink(missing_ok=True)
    groups = [[make_sample(draw, index, *both) for index, both in enumerate(group)] for draw, group in enumerate(lengths)]
    with Journal(path) as journal:
        for group in groups:
            journal.append(group, {})
    os.truncate(path, max(path.stat().st_size - cut, 0))
    for (_, found), expected in zip(read_journal(path), groups, strict=False):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
