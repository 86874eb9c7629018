"""The reader: one rank of a group reads for all, a few micro-batches ahead and no more; errors reach whoever waits for the bytes."""

import threading
import time

import numpy as np
import pytest
import tiny
from run_ranks import run

from miles.data.store.files import Damaged
from miles.data.store.shard import write_shard
from miles.training.batch import open_batch
from miles.training.prefetch import prefetch
from miles.training.reader import Reader


def test_one_rank_of_each_group_reads_and_all_have_the_same(tmp_path):
    samples = tiny.make_samples(3)
    write_shard(tmp_path / "a.h5", samples[:12])
    write_shard(tmp_path / "b.h5", samples[12:])
    rows = [[[[0, 0, 3], [1, 2, 5]], [], [[1, 7, 12]]], [[[0, 5, 6]], [[1, 0, 2], [0, 9, 12]], [[0, 3, 5]]]]
    results = run(4, "reading.group_reads", tmp_path / "out", paths=[str(tmp_path / "a.h5"), str(tmp_path / "b.h5")], rows=rows)
    shards = [samples[:12], samples[12:]]
    for rank, result in enumerate(results):
        assert result["opened"] == (["a.h5", "b.h5"] if rank in (0, 2) else [])
        for found, ranges in zip(result["read"], rows[rank // 2], strict=True):
            chosen = [sample for shard, first, last in ranges for sample in shards[shard][first:last]]
            for name in ("token_id", "rollout_logprob", "loss_mask", "flags"):
                arrays = [getattr(sample, name) for sample in chosen]
                assert found[name] == [arrays[0].dtype.str if arrays else found[name][0], b"".join(array.tobytes() for array in arrays).hex()]
        assert result["first"] == [0] * sum(last - first for ranges in rows[rank // 2] for _, first, last in ranges)
        assert result["failed"] == ("Damaged" if rank in (0, 2) else "UserError")
        assert "b.h5: an HDF5 file expected" in result["why"]


def test_denominators_count_what_is_predicted_and_read_no_masks(ranks, tmp_path, monkeypatch):
    samples = tiny.make_samples(5)
    samples[3].loss_mask[:] = 1  # its first token is in the loss mask, but nothing predicts it
    samples[8].loss_mask[0] = 1
    manifest = tiny.make_batch(tmp_path, samples, steps=2)
    batch = open_batch(manifest, tmp_path, tiny.make_config().algorithm, ranks)
    monkeypatch.setattr("miles.data.store.shard.Shard.tokens", lambda *_: pytest.fail("read whole"))
    expected = [sum(int(sample.loss_mask[1:].sum()) for sample in samples if (sample.draw < 3) == (step == 0)) for step in range(2)]
    assert [batch.whole(step).tokens for step in range(2)] == expected
    batch.close()


def test_prefetch_is_bounded():
    made = []

    def make(number):
        made.append(number)
        return number

    coming = prefetch(make, range(100), ahead=3)
    for taken in range(5):
        assert next(coming) == taken
        deadline = time.monotonic() + 60
        while len(made) < taken + 1 + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # time to go too far
        assert len(made) == taken + 1 + 3
    coming.close()
    assert len(made) == 8
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_an_error_comes_where_its_item_would():
    coming = prefetch(lambda number: 12 // (3 - number), range(9), ahead=2)
    assert [next(coming) for _ in range(3)] == [4, 6, 12]
    with pytest.raises(ZeroDivisionError):
        next(coming)
    with pytest.raises(StopIteration):
        next(coming)


def test_a_reader_that_is_left_early_closes(tmp_path):
    write_shard(tmp_path / "a.h5", tiny.make_samples(0))
    reader = Reader([tmp_path / "a.h5"])
    for _ in reader.micro_batches([[(0, row, row + 1)] for row in range(20)]):
        break
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    reader.close()


def test_a_damaged_shard_is_named(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"not HDF5")
    with pytest.raises(Damaged, match="an HDF5 file expected"):
        list(Reader([tmp_path / "a.h5"]).micro_batches([[(0, 0, 1)]]))


def test_a_micro_batch_without_sequences_is_empty(tmp_path):
    write_shard(tmp_path / "a.h5", tiny.make_samples(0))
    [none] = Reader([tmp_path / "a.h5"]).micro_batches([[]])
    assert {name: (array.dtype, len(array)) for name, array in none.items()} == {
        "token_id": (np.dtype("i4"), 0), "rollout_logprob": (np.dtype("f4"), 0), "loss_mask": (np.dtype("u1"), 0), "flags": (np.dtype("u1"), 0),
    }  # fmt: skip
