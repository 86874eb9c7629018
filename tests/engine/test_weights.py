"""Updates check everything before they change anything."""

from __future__ import annotations

import base64
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from stepping import drain, submit
from tiny_models import write_tiny

from miles.models.hf_folder import weight_checksum

PROMPT = [7, 300, 12, 99]


def greedy(engine) -> list[int]:
    done: list = []
    submit(engine, done, PROMPT, max_new_tokens=12, temperature=0)
    drain(engine)
    return done[0].output


def bucket(tensors: dict[str, torch.Tensor]) -> str:
    return base64.b64encode(save(tensors)).decode()


@pytest.fixture
def other(tmp_path):
    return write_tiny(tmp_path / "other", seed=3)


def _drop_one(tensors):
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]


def _wrong_shape(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def _foreign(tensors):
    tensors["model.extra.weight"] = torch.zeros(3)


def _integers(tensors):
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop_one, "lacks a tensor of the model: model.layers.1.mlp.experts.5.up_proj.weight"),
        (_wrong_shape, r"model.norm.weight of .* has shape \[63\]; the model's is \[64\]"),
        (_foreign, "has a tensor that the model lacks: model.extra.weight"),
        (_integers, "has dtype torch.int32"),
    ],
)
def test_a_folder_that_does_not_fit_changes_nothing(make_engine, other, change, words):
    engine = make_engine()
    before, sums = greedy(engine), engine.checksums()
    tensors = load_file(other / "model.safetensors")
    change(tensors)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        engine.weights.from_disk(str(other))
    success, message = engine.update(lambda: engine.weights.from_disk(str(other)), True, "9")
    assert not success
    assert "\n" not in message
    assert engine.weights.version == "default"
    assert engine.checksums() == sums
    assert greedy(engine) == before


def test_a_truncated_file_changes_nothing(make_engine, other):
    engine = make_engine()
    sums = engine.checksums()
    file = other / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="can't read weights from"):
        engine.weights.from_disk(str(other))
    assert engine.checksums() == sums


def test_a_model_of_another_kind_is_refused(make_engine, tmp_path):
    with pytest.raises(ValueError, match="holds a llama model; this engine serves qwen3_moe"):
        make_engine().weights.from_disk(str(write_tiny(tmp_path / "llama", "llama")))


def test_checksums_are_those_of_the_file(make_engine, other):
    engine = make_engine()
    engine.weights.from_disk(str(other))
    tensors = load_file(other / "model.safetensors")
    each, whole = engine.checksums()
    assert whole == weight_checksum(tensors.items())
    assert set(each) == set(tensors)


def test_buckets_build_an_update(make_engine, other):
    engine, reference = make_engine(), make_engine(folder=str(other))
    tensors = load_file(other / "model.safetensors")
    names = sorted(tensors)
    for part in (names[::2], names[1::2]):
        success, _ = engine.update(lambda part=part: engine.weights.from_bucket(bucket({name: tensors[name] for name in part})), False, None)
        assert success
    assert engine.checksums() == reference.checksums()
    assert greedy(engine) == greedy(reference)


def test_transformers_names_of_experts_are_understood(make_engine, other):
    """A bucket may hold all experts in one tensor, as transformers' modules do."""
    engine, reference = make_engine(), make_engine(folder=str(other))
    engine.weights.from_bucket(bucket({name: tensor.contiguous() for name, tensor in reference.runner.model.state_dict().items()}))
    assert engine.checksums() == reference.checksums()


@pytest.mark.parametrize("payload", ["not base64!", base64.b64encode(b"no safetensors").decode(), base64.b64encode(b"\x80\x04K\x01.").decode(), "", "é"])
def test_what_is_no_bucket_is_refused(make_engine, payload):
    with pytest.raises(ValueError, match="not base64 of a safetensors file"):
        make_engine().weights.from_bucket(payload)


def test_only_a_mistake_is_answered(make_engine):
    """A bug in loading ends the engine; it is not told to the caller as a refusal of the weights."""
    engine = make_engine()

    def bug():
        return str(torch.zeros(2).view(3))

    with pytest.raises(RuntimeError):
        engine.update(bug, True, "9")
    with pytest.raises(ValueError, match="invalid literal"):
        engine.update(lambda: str(int("bug")), True, "9")


def test_tied_heads_stay_tied(make_engine, tmp_path):
    first, second = (write_tiny(tmp_path / str(seed), "qwen2", seed=seed, tie_word_embeddings=True) for seed in (0, 1))
    engine, reference = make_engine(folder=str(first)), make_engine(folder=str(second))
    engine.weights.from_disk(str(second))
    assert engine.checksums() == reference.checksums()
    assert greedy(engine) == greedy(reference)


def test_released_weights_must_be_loaded_before_generation(make_engine, tiny_folder):
    engine = make_engine()
    before = greedy(engine)
    held = engine.runner.cache.nbytes
    assert held > 0
    assert engine.release(["weights", "kv_cache"]) is None
    assert engine.runner.cache is None
    assert sum(parameter.numel() for parameter in engine.runner.model.parameters()) == 0
    assert "released" in engine.why_not_ready()
    assert engine.checksums() is None
    assert not engine.update(lambda: engine.weights.from_disk(str(tiny_folder)), True, None)[0]
    assert "was not released" in engine.resume_memory(["cuda_graph"])
    assert engine.resume_memory(["weights", "kv_cache"]) is None
    assert "have not been loaded again" in engine.why_not_ready()
    assert engine.update(lambda: engine.weights.from_disk(str(tiny_folder)), True, None)[0]
    assert engine.why_not_ready() is None
    assert greedy(engine) == before


def test_old_prefixes_are_not_matched_after_an_update(make_engine, other):
    engine, reference, done = make_engine(), make_engine(folder=str(other)), []
    submit(engine, done, [5] * 30, max_new_tokens=20)
    engine.step()
    success, message = engine.update(lambda: engine.weights.from_disk(str(other)), True, None)
    assert not success
    assert "flush_cache false" in message
    assert engine.update(lambda: engine.weights.from_disk(str(other)), False, "1")[0]
    submit(engine, done, [5] * 30, "fresh", max_new_tokens=20)
    drain(engine)
    submit(reference, done, [5] * 30, "reference", max_new_tokens=20)
    drain(reference)
    by_name = {sequence.request.rid: sequence for sequence in done}
    assert by_name["fresh"].cached_tokens == 0
    assert by_name["fresh"].output == by_name["reference"].output


def test_an_index_of_several_files_is_read_whole(make_engine, other, tmp_path):
    tensors = load_file(other / "model.safetensors")
    split = tmp_path / "split"
    split.mkdir()
    shutil.copy(other / "config.json", split)
    names = sorted(tensors)
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, split / file)
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part}}))
    engine = make_engine()
    engine.weights.from_disk(str(split))
    assert engine.checksums()[1] == weight_checksum(tensors.items())
