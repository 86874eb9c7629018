"""Hugging Face → torch_dist → Hugging Face keeps every bit; what torch itself reads from the checkpoint is what was put in."""

import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert_models import FAMILIES, write_model
from safetensors.torch import load_file, save_file
from scripts import script

from miles.config.exits import UserError
from miles.convert.hf_to_torch_dist import hf_to_torch_dist
from miles.convert.look import inspect
from miles.convert.options import Options
from miles.convert.torch_dist_to_hf import torch_dist_to_hf
from miles.convert.units import Rank
from miles.convert.verify import verify


def equal(one, other):
    """Same names, dtypes and bits."""
    return one.keys() == other.keys() and all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def through_torch(folder, key):
    """A tensor read by torch's own reader."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata[key]
    out = {key: torch.empty(metadata.size, dtype=metadata.properties.dtype)}
    dcp.load(out, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return out[key]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_every_bit(tmp_path, family):
    source = write_model(tmp_path / "hf", family)
    hf_to_torch_dist(source, tmp_path / "td", Options(make_vocab_size_divisible_by=64), Rank(workers=2))
    torch_dist_to_hf(tmp_path / "td", tmp_path / "back")
    assert equal(tensors(source), tensors(tmp_path / "back"))
    assert verify(source, tmp_path / "td").equal


@pytest.mark.parametrize(("family", "layers"), [("deepseek_v3", 1), ("deepseek_v32", 1), ("glm4_moe", 2), ("glm4_moe_lite", 1)])
def test_mtp_layers_keep_every_bit(tmp_path, family, layers):
    source = write_model(tmp_path / "hf", family, layers)
    hf_to_torch_dist(source, tmp_path / "td", Options(mtp_layers=layers))
    torch_dist_to_hf(tmp_path / "td", tmp_path / "back")
    given = tensors(source)
    assert equal(given, tensors(tmp_path / "back"))
    assert inspect(tmp_path / "td").mtp_layers == layers
    projection = given[f"model.layers.{2 + layers - 1}.eh_proj.weight"]
    assert torch.equal(through_torch(tmp_path / "td" / "release", f"mtp.layers.{layers - 1}.eh_proj.weight"), projection)
    report = hf_to_torch_dist(source, tmp_path / "without")
    assert f"{layers} MTP layers of the source are left out" in report.warnings[0]
    assert inspect(tmp_path / "without").mtp_layers == 0


def test_mtp_layers_are_made_up_on_request_only(tmp_path):
    source = write_model(tmp_path / "hf", "deepseek_v3")
    with pytest.raises(UserError, match="the source has 0"):
        hf_to_torch_dist(source, tmp_path / "td", Options(mtp_layers=1))
    assert not (tmp_path / "td").exists()
    for how in ("copy-last", "random"):
        hf_to_torch_dist(source, tmp_path / how, Options(mtp_layers=1, init_mtp=how))
        made = through_torch(tmp_path / how / "release", "mtp.layers.0.transformer_layer.self_attention.linear_proj.weight")
        copied = torch.equal(made, tensors(source)["model.layers.1.self_attn.o_proj.weight"])
        assert copied == (how == "copy-last")
        assert torch.equal(through_torch(tmp_path / how / "release", "mtp.layers.0.enorm.weight"), torch.ones(64).bfloat16())


def test_made_up_biases_are_zero_and_norms_one(tmp_path):
    source = write_model(tmp_path / "hf", "glm4_moe")
    hf_to_torch_dist(source, tmp_path / "td", Options(mtp_layers=1, init_mtp="random"))
    layer = "mtp.layers.0.transformer_layer."
    assert torch.equal(through_torch(tmp_path / "td" / "release", f"{layer}self_attention.linear_qkv.bias"), torch.zeros(128).bfloat16())
    assert torch.equal(through_torch(tmp_path / "td" / "release", f"{layer}mlp.router.expert_bias"), torch.zeros(4))
    assert torch.equal(through_torch(tmp_path / "td" / "release", f"{layer}pre_mlp_layernorm.weight"), torch.ones(64).bfloat16())


def test_tensors_of_several_dtypes_in_one_keep_every_bit(tmp_path):
    source = write_model(tmp_path / "hf", "qwen3")
    given = tensors(source)
    wide = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.v_proj.weight")
    given |= {name: torch.randn(given[name].shape, generator=torch.Generator().manual_seed(3)) for name in wide}
    given["model.layers.0.self_attn.o_proj.weight"] = given["model.layers.0.self_attn.o_proj.weight"].half()
    save_file(given, source / "model.safetensors", metadata={"format": "pt"})
    hf_to_torch_dist(source, tmp_path / "td")
    fused = through_torch(tmp_path / "td" / "release", "decoder.layers.mlp.linear_fc1.weight")[1]
    assert torch.equal(fused, torch.cat([given["model.layers.1.mlp.gate_proj.weight"].float(), given[wide[0]]]))
    torch_dist_to_hf(tmp_path / "td", tmp_path / "back")
    assert equal(given, tensors(tmp_path / "back"))


def test_the_config_that_comes_back_is_true_of_what_is_written(tmp_path):
    source = write_model(tmp_path / "hf", "deepseek_v3", 1)
    hf_to_torch_dist(source, tmp_path / "td", Options(dtype="float32"))
    (tmp_path / "td" / "release" / "miles_source.json").unlink()  # as after training, nothing tells of the source's dtypes
    torch_dist_to_hf(tmp_path / "td", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert config["dtype"] == "float32"
    assert hf_to_torch_dist(tmp_path / "back", tmp_path / "again", Options(strict=True)).warnings == []


def test_fused_tensors_are_put_together_as_megatron_wants_them(tmp_path):
    source = write_model(tmp_path / "hf", "qwen3_moe")
    hf_to_torch_dist(source, tmp_path / "td", Options(make_vocab_size_divisible_by=64))
    given, folder = tensors(source), tmp_path / "td" / "release"
    q, k, v = (given[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    by_hand = torch.cat([torch.cat([q[g * 32 : g * 32 + 32], k[g * 16 : g * 16 + 16], v[g * 16 : g * 16 + 16]]) for g in range(2)])
    assert torch.equal(through_torch(folder, "decoder.layers.self_attention.linear_qkv.weight")[1], by_hand)
    gate, up = (given[f"model.layers.0.mlp.experts.3.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(through_torch(folder, "decoder.layers.mlp.experts.experts.linear_fc1.weight")[0, 3], torch.cat([gate, up]))
    embedding = through_torch(folder, "embedding.word_embeddings.weight")
    assert embedding.shape == (128, 64)
    assert torch.equal(embedding[:96], given["model.embed_tokens.weight"])
    assert not embedding[96:].any()


def test_small_chunks_and_many_ranks_write_the_same_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("miles.convert.conversion.STRIP_BYTES", 1000)
    monkeypatch.setattr("miles.convert.conversion.CHUNK_BYTES", 3000)
    monkeypatch.setattr("miles.convert.conversion.FILE_BYTES", 40_000)
    monkeypatch.setattr("miles.convert.torch_dist_to_hf.SHARD_BYTES", 100_000)
    source = write_model(tmp_path / "hf", "llama4_text")
    for rank in (2, 1, 0):
        hf_to_torch_dist(source, tmp_path / "td", None, Rank(rank, 3, 2))
    torch_dist_to_hf(tmp_path / "td", tmp_path / "back")
    assert len(list((tmp_path / "td" / "release").glob("*.distcp"))) > 5
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert equal(tensors(source), tensors(tmp_path / "back"))


def test_fp8_blocks_are_read_as_an_independent_dequantisation_says(tmp_path):
    source = write_model(tmp_path / "hf", "deepseek_v3", hidden_size=192, q_lora_rank=160)
    given = tensors(source)
    name, generator = "model.layers.0.mlp.gate_proj.weight", torch.Generator().manual_seed(0)
    codes = torch.randn(96, 192, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(1, 2, generator=generator) + 0.1
    save_file(given | {name: codes, f"{name}_scale_inv": scales}, source / "model.safetensors", metadata={"format": "pt"})
    hf_to_torch_dist(source, tmp_path / "td")
    wanted = torch.empty(96, 192)
    for row in range(96):
        for column in range(192):
            wanted[row, column] = codes[row, column].float() * scales[row // 128, column // 128]
    assert torch.equal(through_torch(tmp_path / "td" / "release", "decoder.layers.0.mlp.linear_fc1.weight")[:96], wanted.bfloat16())


def test_verify_says_what_differs_and_by_how_much(tmp_path):
    source = write_model(tmp_path / "hf", "qwen3")
    hf_to_torch_dist(source, tmp_path / "td")
    other = tensors(source)
    other["model.norm.weight"][3] += 0.5
    save_file(other, source / "model.safetensors", metadata={"format": "pt"})
    verdict = verify(source, tmp_path / "td")
    assert not verdict.equal
    assert verdict.different == [{"name": "model.norm.weight", "what": "1 numbers differ", "largest": 0.5}]


def test_verify_of_nan_is_json_and_single_numbers_are_compared(tmp_path):
    source = write_model(tmp_path / "hf", "qwen3")
    given = tensors(source) | {"vision.scale": torch.tensor(3.0)}
    save_file(given, source / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(source, tmp_path / "other")
    assert verify(source, tmp_path / "other").equal
    given["model.norm.weight"][3], given["vision.scale"] = float("nan"), torch.tensor(5.0)
    save_file(given, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    done = script("verify", source, tmp_path / "other", "--json")
    found = json.loads(done.out, parse_constant=lambda word: pytest.fail(word))
    by_name = {entry.pop("name"): entry for entry in found["different"]}
    assert by_name == {"model.norm.weight": {"what": "1 numbers differ, by NaN or infinity"}, "vision.scale": {"what": "1 numbers differ", "largest": 2.0}}


def test_sharded_source_with_an_index(tmp_path):
    source = write_model(tmp_path / "hf", "llama")
    given = tensors(source)
    names = sorted(given)
    (source / "model.safetensors").unlink()
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: given[name] for name in part}, source / file)
    where = {name: file for file, part in halves.items() for name in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    hf_to_torch_dist(source, tmp_path / "td")
    assert verify(source, tmp_path / "td").equal
