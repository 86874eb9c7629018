import h5py
import numpy as np
import pytest
import xxhash

from miles.data.store.epoch import Fence, new_epoch
from miles.data.store.files import Damaged
from miles.data.store.hdf5 import verify_own
from miles.data.store.routes import open_routes, write_routes
from miles.data.store.train_record import open_train_record, write_train_record
from miles.training.batch import Seen
from miles.training.record import OwnPart


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_routes_of_rows_that_have_them(tmp_path, make_sample, dtype):
    generator = np.random.default_rng(0)
    routes = {draw: generator.integers(0, 200, (rows, 3, 2)).astype(dtype) for draw, rows in ((0, 4), (2, 0), (3, 6))}
    samples = [make_sample(draw, 0, routes=routes.get(draw)) for draw in (3, 1, 0, 2)]
    sealed = write_routes(tmp_path / "routes.0.h5", samples, {"step": 1})
    assert sealed.bytes == (tmp_path / "routes.0.h5").stat().st_size
    with h5py.File(tmp_path / "routes.0.h5", "r") as file:
        assert file.attrs["schema"] == "miles.routes/1"
        assert file["sequence"][:].tolist() == [0, 2, 3]
        assert file["offset"][:].tolist() == [0, 4, 4, 10]
        assert (file["expert"].dtype, file["expert"].shape) == (dtype, (10, 3, 2))
    with open_routes(tmp_path / "routes.0.h5") as opened:
        assert opened.shape == (3, 2)
        for first, last in ((0, 4), (1, 3), (3, 4), (1, 2)):
            found = opened.experts(first, last)
            assert sorted(found) == [row for row in (0, 2, 3) if first <= row < last]
            for row, experts in found.items():
                assert experts.tobytes() == routes[row].tobytes()


def test_no_routes_no_file(tmp_path, make_sample):
    assert write_routes(tmp_path / "routes.0.h5", [make_sample(0, 0)]) is None
    assert list(tmp_path.iterdir()) == []


def part(rank, lengths, names=()):
    """A rank's part of one micro-batch."""
    generator = np.random.default_rng(rank)
    total = sum(lengths)
    values = {name: generator.random(total, np.float32) for name in ("train_logprob", "entropy", "advantage", *names)}
    values["used"] = np.ones(total, np.uint8)
    return OwnPart(rank, [Seen(np.zeros(len(lengths), np.int64), np.arange(len(lengths)) + 10 * rank, np.array(lengths, np.int64), values)])


def test_record_of_a_node(tmp_path):
    parts = [part(1, [2, 0, 3], names=("ref_logprob",)), part(0, [4]), part(2, [])]
    write_train_record(tmp_path / "node.h5", parts, {"layout": {"dp": 3}})
    with open_train_record(tmp_path / "node.h5") as record:
        assert record.attrs["schema"] == "miles.train/1"
        sequences = record.sequences()
        assert {name: (array.dtype, array.tolist()) for name, array in sequences.items()} == {
            "shard": (np.uint16, [0] * 4), "row": (np.uint32, [0, 10, 11, 12]), "offset": (np.uint64, [0, 4, 6, 6, 9]), "rank": (np.uint32, [0, 1, 1, 1])
        }  # fmt: skip
        assert sorted(record.names) == ["advantage", "entropy", "ref_logprob", "train_logprob", "used"]
        found = record.tokens(1, 4, ["train_logprob", "ref_logprob"])
        assert found["train_logprob"].tobytes() == parts[0].seen[0].values["train_logprob"].tobytes()
        assert found["ref_logprob"].tobytes() == parts[0].seen[0].values["ref_logprob"].tobytes()
        assert np.isnan(record.tokens(0, 1, ["ref_logprob"])["ref_logprob"]).all()


def test_a_record_expects_what_its_user_block_says(tmp_path):
    path = tmp_path / "node_0000.h5"
    write_train_record(path, [part(0, [3])])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    said, is_now = content[:512].rstrip(b"\0\n").decode(), f"miles xxh3 {xxhash.xxh3_64_hexdigest(bytes(content[512:]))}"
    with pytest.raises(Damaged, match=rf"'{said}\\n' expected .*, '{is_now}\\n' found"):
        verify_own(path)


def test_counts_by_layer_are_those_of_all_ranks(tmp_path):
    parts = [part(0, [3]), part(1, [2]), part(2, [4])]
    for number in (0, 2):
        parts[number].layers = {"routed": np.array([0, 5, 5], np.uint64), "route_miss": np.array([0, 1, number], np.uint64)}
    write_train_record(tmp_path / "node.h5", parts)
    write_train_record(tmp_path / "without.h5", parts[1:2])
    with open_train_record(tmp_path / "node.h5") as record:
        assert {name: (counts.dtype, counts.tolist()) for name, counts in record.layers().items()} == {"routed": (np.uint64, [0, 10, 10]), "route_miss": (np.uint64, [0, 2, 2])}
    with open_train_record(tmp_path / "without.h5") as record:
        assert record.layers() == {}


def test_record_of_nothing(tmp_path):
    write_train_record(tmp_path / "node.h5", [])
    with open_train_record(tmp_path / "node.h5") as record:
        assert record.sequences()["offset"].tolist() == [0]


def test_arrays_of_other_lengths_are_our_fault(tmp_path):
    other = part(0, [3])
    other.seen[0].values["entropy"] = np.zeros(2, np.float32)
    with pytest.raises(AssertionError, match="entropy: 3 tokens"):
        write_train_record(tmp_path / "node.h5", [other])
    assert list(tmp_path.iterdir()) == []


def test_a_record_names_the_attempt_that_wrote_it(tmp_path, run_dir):
    """One without the attribute is read all the same."""
    for _ in range(2):
        epoch = new_epoch(run_dir)
    write_train_record(tmp_path / "new.h5", [part(0, [3])], {"step": 5}, Fence(run_dir, epoch))
    write_train_record(tmp_path / "old.h5", [part(0, [3])], {"step": 5})
    found = {}
    for name in ("new", "old"):
        with open_train_record(tmp_path / f"{name}.h5") as record:
            found[name] = record.attrs
    assert found == {"new": {"schema": "miles.train/1", "step": 5, "epoch": 2}, "old": {"schema": "miles.train/1", "step": 5}}
