import h5py
import numpy as np
import pytest
import xxhash

from miles.data.store.files import Damaged
from miles.data.store.hdf5 import verify_own
from miles.data.store.routes import open_routes, write_routes
from miles.data.store.train_record import TrainPart, open_train_record, write_train_record


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


def part(rank, lengths, **more):
    generator = np.random.default_rng(rank)
    total = sum(lengths)
    arrays = {name: generator.random(total, np.float32) for name in ("train_logprob", "entropy", "advantage")}
    return TrainPart(
        rank=rank,
        shard=np.zeros(len(lengths), np.uint16),
        row=np.arange(len(lengths), dtype=np.uint32) + 10 * rank,
        offset=np.cumsum([0, *lengths]).astype(np.uint64),
        used=np.ones(total, np.uint8),
        **arrays,
        **{name: generator.random(total, np.float32) for name in more.get("names", ())},
    )


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
        assert found["train_logprob"].tobytes() == parts[0].train_logprob.tobytes()
        assert found["ref_logprob"].tobytes() == parts[0].ref_logprob.tobytes()
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


def test_record_of_nothing(tmp_path):
    write_train_record(tmp_path / "node.h5", [])
    with open_train_record(tmp_path / "node.h5") as record:
        assert record.sequences()["offset"].tolist() == [0]


def test_arrays_of_other_lengths_are_our_fault():
    good = part(0, [3])
    with pytest.raises(AssertionError, match="entropy: 3 tokens"):
        TrainPart(**{**vars(good), "entropy": good.entropy[:2]})
