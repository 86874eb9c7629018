"""Folders of safetensors and the fingerprint of weights."""

import json
import struct

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from miles.models.hf_folder import load_state, named_tensors, save_hf, tokenizer_files, weight_checksum

CONFIG = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
          "head_dim": 16, "vocab_size": 64}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10_000_000, 20_000])
def test_transformers_loads_what_we_write(tmp_path, tied, shard_bytes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG, tie_word_embeddings=tied))
    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    folder = tmp_path / "hf"
    save_hf(folder, model.config, tokenizer_files(tmp_path), named_tensors(model), shard_bytes)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr() or not tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    names = {name for name, _ in load_state(folder)}
    assert ("lm_head.weight" in names) is not tied
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    files = sorted(folder.glob("*.safetensors"))
    if shard_bytes == 20_000:
        assert len(files) > 1
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert weight_map == {name: f.name for f in files for name in load_file(f)}
    else:
        assert [f.name for f in files] == ["model.safetensors"]


def test_a_missing_shard_is_named(tmp_path):
    save_hf(tmp_path, {"model_type": "llama"}, [], [("a", torch.zeros(8)), ("b", torch.zeros(8))], shard_bytes=32)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002"):
        list(load_state(tmp_path))
    with pytest.raises(ValueError, match="no tensors"):
        save_hf(tmp_path / "x", {}, [], [])


def test_views_of_one_storage_are_written_apart(tmp_path):
    whole = torch.arange(6.0)
    save_hf(tmp_path, {}, [], [("whole", whole), ("part", whole[:3])])
    assert {name: tensor.tolist() for name, tensor in load_state(tmp_path)} == {"whole": [0, 1, 2, 3, 4, 5], "part": [0, 1, 2]}


def test_checksum_is_what_its_docstring_says():
    one = xxhash.xxh3_128(b"a float32 (2,)\n" + struct.pack("<2f", 1.5, -2.0)).digest()
    two = xxhash.xxh3_128(b"b bfloat16 (1, 1)\n" + b"\x80\x3f").digest()
    tensors = [("b", torch.ones(1, 1, dtype=torch.bfloat16)), ("a", torch.tensor([1.5, -2.0]))]
    assert weight_checksum(tensors) == xxhash.xxh3_128(one + two).hexdigest()
    assert weight_checksum(reversed(tensors)) == weight_checksum(tensors)
    for other in ([("a", tensors[1][1]), ("c", tensors[0][1])], [("a", torch.tensor([1.5, -2.5])), tensors[0]], [("a", torch.tensor([[1.5, -2.0]])), tensors[0]]):
        assert weight_checksum(other) != weight_checksum(tensors)
