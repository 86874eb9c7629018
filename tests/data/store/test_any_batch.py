"""What is written is what is read, for any ragged batch, however it is cut, sliced, or divided over workers."""

from __future__ import annotations

import shutil

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_journal import assert_same
from test_shard import BATCHES

from miles.data.plan_batch import assign
from miles.data.sample import Sample, Status
from miles.data.store.journal import Journal, read_group, read_journal
from miles.data.store.routes import open_routes, write_routes
from miles.data.store.shard import open_shard, write_shard
from miles.data.store.train_record import ALWAYS, TOKENS, open_train_record, write_train_record
from miles.training.batch import Seen
from miles.training.record import OwnPart

QUICK = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
TEXT = st.none() | st.text(st.characters() | st.sampled_from(["\0", "\ud800", "\udfff", "é", "😀", "\u2028"]), max_size=6)  # a journal keeps what HDF5 can't


def fresh(tmp_path):
    shutil.rmtree(tmp_path / "files", ignore_errors=True)
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def long_sample(draw: int) -> Sample:
    """A sequence of 65,536 tokens after a prompt of one."""
    generator, length = np.random.default_rng(draw), 65_537
    logprob = -generator.random(length, np.float32)
    logprob[0] = np.nan
    return Sample(draw, 0, 2**64 - 1, generator.integers(0, 2**31, length).astype(np.int32), 1, logprob, np.ones(length, np.uint8), np.ones(length, np.uint8), Status.TRUNCATED, 0.5)


@QUICK
@given(batch=BATCHES, cuts=st.tuples(st.integers(0, 6), st.integers(0, 6)))
@example(batch=(long_sample(1), long_sample(0)), cuts=(1, 2))
def test_a_slice_of_a_shard_is_that_slice_of_the_whole(tmp_path, batch, cuts):
    path = fresh(tmp_path) / "rollout.0.h5"
    write_shard(path, list(batch))
    first, last = sorted(min(cut, len(batch)) for cut in cuts)
    with open_shard(path) as shard:
        offset = shard.sequences()["offset"].astype(int)
        for name in shard.names:
            whole = shard.tokens(0, len(batch), [name])[name]
            assert shard.tokens(first, last, [name])[name].tobytes() == whole[offset[first] : offset[last]].tobytes()
        for name in ("prompt", "response", "label"):
            assert shard.texts(name, first, last) == shard.texts(name, 0, len(batch))[first:last]
        assert shard.runs(first, last) == shard.runs(0, len(batch))[first:last]
        for one, other in zip(shard.samples(first, last), shard.samples()[first:last], strict=True):
            assert_same(one, other)


@QUICK
@given(batch=BATCHES, workers=st.integers(1, 4), data=st.data())
def test_whatever_the_partition_over_workers_the_batch_is_the_same(tmp_path, batch, workers, data):
    """The union of the shards, and who trains on what, as (draw, sample)."""
    folder = fresh(tmp_path)
    batch = [sample for sample in batch if sample.draw < 2**63]  # the assignment counts in i64
    owner = {sample.draw: data.draw(st.integers(0, workers - 1)) for sample in batch}

    def seal(name, owner_of):
        shards = []
        for worker in range(workers):
            path = folder / f"{name}.{worker}.h5"
            write_shard(path, [sample for sample in batch if owner_of(sample) == worker])
            with open_shard(path) as shard:
                shards.append(shard.samples())
        keys = [(sample.draw, sample.sample, len(sample.token_id), worker, row) for worker, found in enumerate(shards) for row, sample in enumerate(found)]
        columns = [list(column) for column in zip(*keys, strict=True)] or [[]] * 5
        steps = assign(columns[2], columns[0], columns[1], columns[3], columns[4], dp_size=2, max_tokens=10) if keys else []
        named = [[[[(s.draw, s.sample) for shard, a, b in micro for s in shards[shard][a:b]] for micro in rank] for rank in ranks] for ranks in steps]
        return sorted((sample for found in shards for sample in found), key=lambda sample: (sample.draw, sample.sample)), named

    divided, assigned = seal("divided", lambda sample: owner[sample.draw])
    single, expected = seal("single", lambda sample: 0)
    assert assigned == expected
    assert len(divided) == len(single) == len(batch)
    for one, other in zip(divided, single, strict=True):
        if (one.kept_mass is None) != (other.kept_mass is None):  # a file has the column when any of its samples has it
            assert np.isnan(one.kept_mass if other.kept_mass is None else other.kept_mass).all()
            one.kept_mass = other.kept_mass = None
        assert_same(one, other)


@QUICK
@given(batch=BATCHES, texts=st.lists(TEXT, min_size=3, max_size=3), data=st.data())
@example(batch=(long_sample(0),), texts=["\0", "\ud800", None], data=None)
def test_a_journal_gives_back_any_groups(tmp_path, batch, texts, data):
    path, groups = fresh(tmp_path) / "w.1.log", []
    for number, sample in enumerate(batch):
        sample.prompt, sample.response, sample.label = texts
        if data is not None and data.draw(st.booleans()):
            shape = (max(len(sample.token_id) - 1, 0), 2, 3)
            sample.routes = np.random.default_rng(number).integers(0, 256, shape).astype(data.draw(st.sampled_from([np.uint8, np.uint16])))
        if number % 2:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    with Journal(path) as journal:
        positions = [journal.append(group, {"step": number, "kind": "é"}) for number, group in enumerate(groups)]
    found = list(read_journal(path))
    assert [context for context, _ in found] == [{"step": number, "kind": "é"} for number in range(len(groups))]
    for (_, group), position, expected in zip(found, positions, groups, strict=True):
        for one, again, other in zip(group, read_group(path, position), expected, strict=True):
            assert_same(one, other)
            assert_same(again, other)


@QUICK
@given(lengths=st.lists(st.none() | st.integers(0, 9), min_size=1, max_size=8), dtype=st.sampled_from([np.uint8, np.uint16]), inner=st.tuples(st.integers(1, 3), st.integers(1, 3)), data=st.data())
def test_any_slice_of_routes(tmp_path, make_sample, lengths, dtype, inner, data):
    """Some samples with routes, some without: rows come back under their place in the shard."""
    path, generator = fresh(tmp_path) / "routes.0.h5", np.random.default_rng(0)
    routes = [None if length is None else generator.integers(0, 256, (length, *inner)).astype(dtype) for length in lengths]
    samples = [make_sample(draw, 0, routes=each) for draw, each in enumerate(routes)]
    order = data.draw(st.permutations(samples))
    if write_routes(path, order) is None:
        assert all(each is None for each in routes)
        return
    first, last = sorted(data.draw(st.tuples(st.integers(0, len(lengths)), st.integers(0, len(lengths)))))
    with open_routes(path) as opened:
        found = opened.experts(first, last)
    assert {row: experts.tobytes() for row, experts in found.items()} == {row: each.tobytes() for row, each in enumerate(routes) if each is not None and first <= row < last}
    assert all(experts.dtype == dtype and experts.shape[1:] == inner for experts in found.values())


@st.composite
def parts(draw, rank):
    """Of no to three micro-batches."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    names = [*ALWAYS, *draw(st.sets(st.sampled_from([name for name in TOKENS if name not in ALWAYS])))]
    seen = []
    for lengths in draw(st.lists(st.lists(st.integers(0, 7), max_size=4), max_size=3)):
        total = sum(lengths)
        values = {name: generator.integers(0, 2**32, total, np.uint64).astype(np.uint32).view(np.float32) if TOKENS[name] is np.float32 else generator.integers(0, 256, total).astype(np.uint8) for name in names}
        seen.append(Seen(generator.integers(0, 2**16, len(lengths)), generator.integers(0, 2**32, len(lengths)), np.array(lengths, np.int64), values))
    return OwnPart(rank, seen)


@QUICK
@given(made=st.integers(0, 3).flatmap(lambda ranks: st.tuples(*(parts(rank) for rank in range(ranks)))), data=st.data())
def test_a_train_record_gives_back_any_parts(tmp_path, made, data):
    path = fresh(tmp_path) / "node_0000.h5"
    write_train_record(path, data.draw(st.permutations(made)) if made else [])
    with open_train_record(path) as record:
        table, start = record.sequences(), 0
        assert table["rank"].tolist() == [part.rank for part in made for each in part.seen for _ in each.row]
        for name in ("shard", "row"):
            assert table[name].tolist() == [value for part in made for each in part.seen for value in getattr(each, name).tolist()]
        for part in made:
            end = start + sum(len(each.row) for each in part.seen)
            found = record.tokens(start, end, record.names)
            for name in record.names:
                if part.seen and name not in part.seen[0].values:
                    assert (np.isnan(found[name]) if TOKENS[name] is np.float32 else found[name] == 0).all()
                else:
                    assert found[name].tobytes() == b"".join(each.values[name].tobytes() for each in part.seen), name
            start = end
        assert set(record.names) == {*ALWAYS, *(name for part in made for each in part.seen for name in each.values)}
