import json

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from miles.data.sample import Sample, Status
from miles.data.store.files import Damaged
from miles.data.store.shard import open_shard, write_shard

FLOATS32 = st.floats(width=32, allow_nan=False)
ODD_TEXT = st.text(st.characters() | st.sampled_from(["\0", "\udc80", "\udfff"]))  # lone surrogates: what reading bytes as text may leave
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | ODD_TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXT, inner, max_size=3), max_leaves=5)
TEXT = st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@st.composite
def samples(draw, key):
    prompt, response = draw(st.integers(0, 6)), draw(st.integers(0, 12))
    length = prompt + response
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    return Sample(
        draw=key[0],
        sample=key[1],
        seed=draw(st.integers(0, 2**64 - 1)),
        token_id=generator.integers(-(2**31), 2**31, length).astype(np.int32),
        prompt_length=prompt,
        rollout_logprob=generator.integers(0, 2**32, length, np.uint64).astype(np.uint32).view(np.float32),  # any bits, NaNs of all sorts
        loss_mask=generator.integers(0, 2, length).astype(np.uint8),
        flags=generator.integers(0, 64, length).astype(np.uint8),
        status=draw(st.sampled_from(Status)),
        reward=draw(FLOATS32),
        reward_parts=draw(st.dictionaries(st.sampled_from(["a", "ü", "z"]), FLOATS32)),
        runs=draw(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=3)),
        turns=draw(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 255)), max_size=3)),
        engine=draw(st.sampled_from(["", "http://a:1", "http://b:2"])),
        source=draw(st.sampled_from(["data", "größe"])),
        cached_tokens=draw(st.integers(0, 2**32 - 1)),
        metadata=draw(st.dictionaries(ODD_TEXT, JSON, max_size=3)),
        prompt=draw(TEXT),
        response=draw(TEXT),
        label=draw(TEXT),
        kept_mass=draw(st.none() | st.just(generator.random(length).astype(np.float16))),
    )


BATCHES = st.lists(st.tuples(st.integers(0, 2**64 - 1) | st.integers(0, 3), st.integers(0, 65535) | st.integers(0, 3)), max_size=6, unique=True).flatmap(lambda keys: st.tuples(*(samples(key) for key in keys)))


def assert_round_trip(path, batch):
    expected = sorted(batch, key=lambda sample: (sample.draw, sample.sample))
    sealed = write_shard(path, batch)
    assert sealed.bytes == path.stat().st_size
    any_kept = any(sample.kept_mass is not None for sample in batch)
    with open_shard(path) as shard:
        assert len(shard) == len(batch)
        found = shard.samples()
        trained = shard.sequences()["trained_tokens"]
    assert len(found) == len(expected)
    for row, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert trained[row] == int(other.loss_mask.sum())
        for name, value in vars(other).items():
            back = getattr(one, name)
            if name == "kept_mass" and value is None:
                assert back is None or (any_kept and np.isnan(back).all())
            elif isinstance(value, np.ndarray):
                assert (back.dtype, back.tobytes()) == (value.dtype, value.tobytes()), name
            else:
                assert back == value, name


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(batch=BATCHES)
@example(batch=())
def test_round_trip_of_any_batch(tmp_path, batch):
    path = tmp_path / "rollout.0.h5"
    path.unlink(missing_ok=True)
    assert_round_trip(path, list(batch))


@pytest.mark.parametrize(("prompt", "response"), [(0, 0), (5, 0), (0, 1), (1, 65_536), (65_000, 1_000)])
def test_round_trip_of_extreme_lengths(tmp_path, make_sample, prompt, response):
    assert_round_trip(tmp_path / "rollout.0.h5", [make_sample(3, 1, prompt, response), make_sample(3, 0, 2, 2), make_sample(1, 0, prompt, response)])


def test_many_long_sequences_are_written_in_blocks(tmp_path, make_sample):
    batch = [make_sample(draw, 0, 10, 65_536) for draw in range(40)]  # 2.6 M tokens: several blocks
    write_shard(tmp_path / "rollout.0.h5", batch)
    with open_shard(tmp_path / "rollout.0.h5") as shard:
        for row in (0, 15, 16, 39):
            assert shard.tokens(row, row + 1, ["token_id"])["token_id"].tobytes() == batch[row].token_id.tobytes()


def test_a_slice_is_the_slice(tmp_path, make_sample):
    batch = [make_sample(draw, sample, draw, sample) for draw in range(4) for sample in range(3)]
    write_shard(tmp_path / "rollout.0.h5", batch)
    with open_shard(tmp_path / "rollout.0.h5") as shard:
        found = shard.tokens(4, 9, ["token_id", "loss_mask"])
        assert list(found) == ["token_id", "loss_mask"]
        assert found["token_id"].tolist() == np.concatenate([sample.token_id for sample in batch[4:9]]).tolist()
        assert [sample.draw for sample in shard.samples(4, 9)] == [1, 1, 2, 2, 2]
        assert shard.runs(4, 6) == [[(0, 1)], [(0, 1)]]
        assert shard.turns(11, 12) == [[(0, 0), (3, 1)]]
        assert shard.tokens(5, 5)["token_id"].size == 0
        with pytest.raises(AssertionError, match="rows 4 to 13 of 12"):
            shard.tokens(4, 13)


def test_layout_is_as_the_format_says(tmp_path, make_sample):
    batch = [
        make_sample(9, 1, 2, 1, engine="b", prompt="p", reward_parts={"x": 1.0}, kept_mass=np.ones(3, np.float16)),
        make_sample(4, 0, 1, 2, engine="a", metadata={"k": "é"}),
    ]
    write_shard(tmp_path / "rollout.0.h5", batch, {"worker": 0, "epoch": 3, "sampling": {"top_p": 1.0}})
    with h5py.File(tmp_path / "rollout.0.h5", "r") as file:
        assert file.attrs["schema"] == "miles.rollout/1"
        assert (file.attrs["worker"], file.attrs["epoch"], json.loads(file.attrs["sampling"])) == (0, 3, {"top_p": 1.0})
        types = {
            "sequences/offset": "u8", "sequences/prompt_length": "u4", "sequences/draw": "u8", "sequences/sample": "u2", "sequences/reward": "f4", "sequences/reward_parts": "f4",
            "sequences/status": "u1", "sequences/seed": "u8", "sequences/engine": "u2", "sequences/source": "u2", "sequences/cached_tokens": "u4", "sequences/trained_tokens": "u4",
            "tokens/token_id": "i4", "tokens/rollout_logprob": "f4", "tokens/loss_mask": "u1", "tokens/flags": "u1", "tokens/kept_mass": "f2",
            "runs/sequence": "u4", "runs/start": "u4", "runs/weight_version": "u4", "turns/sequence": "u4", "turns/start": "u4", "turns/role": "u1",
        }  # fmt: skip
        assert {name: file[name].dtype.str[1:] for name in types} == types
        assert file["sequences/offset"][:].tolist() == [0, 3, 6]
        assert file["sequences/draw"][:].tolist() == [4, 9]
        assert file["sequences/engine"].attrs["names"].tolist() == ["a", "b"]
        assert file["sequences/engine"][:].tolist() == [0, 1]
        assert file["sequences/reward_parts"][:].tolist()[1] == [1.0]
        assert np.isnan(file["sequences/reward_parts"][0]).all()
        assert json.loads(file["sequences/metadata"].asstr()[0]) == {"k": "é"}
        assert file["sequences/prompt"].asstr()[:].tolist() == ["", "p"]
        assert file["sequences/texts"][:].tolist() == [0, 1]
        assert file["tokens/token_id"].chunks is None
        assert np.isnan(file["tokens/kept_mass"][:3]).all()


def test_text_that_hdf5_cannot_hold(tmp_path, make_sample):
    write_shard(tmp_path / "rollout.0.h5", [make_sample(0, 0, response="a\0b\ud800c", metadata={"k": "a\0b\ud800c"})])
    with open_shard(tmp_path / "rollout.0.h5") as shard:
        (sample,) = shard.samples()
    assert sample.response == "a\u2400b?c"
    assert sample.metadata == {"k": "a\0b\ud800c"}


def test_unknown_datasets_are_passed_over(tmp_path, make_sample):
    path = tmp_path / "rollout.0.h5"
    write_shard(path, [make_sample(0, 0)])
    with h5py.File(path, "r+") as file:
        file["tokens/new"] = np.zeros(5)
        file["sequences/new"] = np.zeros(1)
        file.create_group("later")
    with open_shard(path) as shard:
        assert shard.samples()[0].draw == 0


def test_other_kinds_and_no_hdf5_are_refused_by_name(tmp_path, make_sample):
    path = tmp_path / "rollout.0.h5"
    write_shard(path, [make_sample(0, 0)])
    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = "miles.rollout/2"
    with pytest.raises(ValueError, match=r"rollout\.0\.h5: is miles\.rollout/2, and this miles reads miles\.rollout/1"):
        open_shard(path)
    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = "miles.routes/1"
    with pytest.raises(ValueError, match=r"is a miles\.routes/1 file"):
        open_shard(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(Damaged, match=r"rollout\.0\.h5: an HDF5 file expected"):
        open_shard(path)
    with pytest.raises(FileNotFoundError):
        open_shard(tmp_path / "none.h5")


def test_samples_are_asked_for_one_at_a_time(tmp_path, make_sample):
    """A lazy sequence bounds the writer's memory: each sample twice, none twice in a row from a copy kept."""
    asked = []

    class Lazy(list):
        def __iter__(self):
            for index in range(3):
                yield self[index]

        def __getitem__(self, index):
            asked.append(index)
            return make_sample(2 - index, 0)

        def __len__(self):
            return 3

    write_shard(tmp_path / "rollout.0.h5", Lazy())
    assert asked == [0, 1, 2, 2, 1, 0]


def test_a_sample_twice_is_our_fault(tmp_path, make_sample):
    with pytest.raises(AssertionError, match="a sample is in a shard once"):
        write_shard(tmp_path / "rollout.0.h5", [make_sample(0, 0), make_sample(0, 0)])
