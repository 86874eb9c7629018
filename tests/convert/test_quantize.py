"""FP8 blocks and INT4 groups against formulas written out, and whole folders there and back."""

import json

import numpy as np
import pytest
import torch
from convert_models import write_model
from safetensors.torch import load_file, save_file
from scripts import script

from miles.convert.hf_to_torch_dist import hf_to_torch_dist
from miles.convert.quantize import Target, quantize
from miles.convert.torch_dist_to_hf import torch_dist_to_hf
from miles.convert.verify import verify
from miles.precision import fp8_blocks, int4_groups


@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_blocks_follow_the_formula(power_of_two):
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight[:128, :128] = 0
    codes, scales = fp8_blocks.quantize(weight, power_of_two)
    for i, j in ((0, 0), (0, 2), (1, 1), (1, 2)):
        block = weight[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128].float()
        scale = block.abs().max() / 448 if block.any() else torch.tensor(1.0)
        if power_of_two:
            scale = 2.0 ** torch.ceil(torch.log2(scale))
        assert scales[i, j] == scale
        wanted = (block / scale).to(torch.float8_e4m3fn)
        assert torch.equal(codes[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128].float(), wanted.float())
    back, middle = torch.empty(200, 300).bfloat16(), torch.empty(120, 300).bfloat16()
    fp8_blocks.dequantize_rows(codes, scales, 0, back)
    assert (back.float() - weight.float()).abs().max() <= 2**-4 * weight.abs().max() * (2 if power_of_two else 1)
    fp8_blocks.dequantize_rows(codes[70:190], scales, 70, middle)
    assert torch.equal(middle, back[70:190])


def test_int4_groups_follow_the_formula():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    packed, scales = int4_groups.quantize(weight, 32)
    for row in range(6):
        for group in range(2):
            values = weight[row, group * 32 : group * 32 + 32].float()
            scale = (values.abs().max() / 7.5).bfloat16()
            assert scales[row, group] == scale
            codes = (values / scale.float()).round().clamp(-8, 7)
            for i in range(32):
                word, place = divmod(group * 32 + i, 8)
                assert ((int(packed[row, word]) >> (4 * place)) & 15) - 8 == codes[i]
            assert torch.equal(int4_groups.dequantize(packed, scales)[row, group * 32 : group * 32 + 32], (codes * scale.float()).bfloat16())


RAGGED = {"hidden_size": 192, "intermediate_size": 300, "moe_intermediate_size": 160}  # blocks of 128 and groups of 32 that do not come out even
CODES = np.array([(-1.0) ** (c >> 7) * ((c & 7) / 8 * 2.0**-6 if c >> 3 & 15 == 0 else (1 + (c & 7) / 8) * 2.0 ** ((c >> 3 & 15) - 7)) for c in range(256)])
CODES[[0x7F, 0xFF]] = np.nan  # FP8 with four bits of exponent and three of mantissa, as IEEE 754 would write it but without infinity


def bf16(values):
    """float32 numbers rounded to bfloat16, to nearest with ties to even, by their bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


def by_hand_fp8(codes, scales):
    """The values [N, K] that codes (bytes) and scales stand for, in bfloat16."""
    wide = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: codes.shape[0], : codes.shape[1]]
    return bf16(CODES[codes].astype(np.float32) * wide)


def by_hand_int4(packed, scales):
    values = np.stack([(packed.view(np.uint32) >> (4 * i) & 15).astype(np.int64) - 8 for i in range(8)], -1).reshape(len(packed), -1)
    return bf16(values.astype(np.float32) * np.repeat(scales, values.shape[1] // scales.shape[1], 1))


def closest(ratio):
    """The distance of each number to the nearest that FP8 has."""
    finite = np.sort(CODES[np.isfinite(CODES)]).astype(np.float32)
    at = np.clip(np.searchsorted(finite, ratio), 1, len(finite) - 1)
    return np.minimum(abs(finite[at] - ratio), abs(finite[at - 1] - ratio))


def test_every_fp8_code_with_every_sign_and_exponent_of_a_scale_has_the_bits_of_the_product_rounded_twice():
    kinds = np.arange(1 << 14, dtype=np.uint32) << 18  # sign, exponent and five bits of mantissa: zeros, denormal numbers, infinities, NaN are among them
    scales = (kinds | np.random.default_rng(1).integers(0, 1 << 18, kinds.size, dtype=np.uint32)).view(np.float32)
    scales[:: 1 << 13] = 0.0, -0.0
    scales[[0xFF << 5, 0x1FF << 5]] = np.inf, -np.inf
    scales[[(1 << 13) - 1, -1]] = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)  # NaN that rounding by bits would carry into the sign
    codes = np.stack([np.arange(256, dtype=np.uint8).reshape(2, 128)] * scales.size, axis=1).reshape(2, -1)
    found = torch.empty(codes.shape, dtype=torch.bfloat16)
    fp8_blocks.dequantize_rows(torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales)[None], 0, found)
    with np.errstate(all="ignore"):
        product = CODES.astype(np.float32)[codes] * np.repeat(scales, 128)
    none = np.isnan(product)
    assert np.array_equal(np.isnan(found.float().numpy()), none)
    assert np.array_equal(found.float().numpy()[~none].view(np.int32), bf16(product)[~none].view(np.int32))


@pytest.mark.parametrize("columns", [1, 31, 127, 129, 300])
def test_rows_from_within_a_block_and_of_any_width_have_their_blocks_scales(columns):
    generator = np.random.default_rng(columns)
    codes = generator.integers(0, 256, (190, columns), dtype=np.uint8)
    scales = np.exp2(generator.normal(0, 20, (3, -(-columns // 128)))).astype(np.float32)
    found = torch.empty(codes.shape, dtype=torch.bfloat16)
    fp8_blocks.dequantize_rows(torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales), 100, found)
    wanted = by_hand_fp8(np.concatenate([np.zeros((100, columns), np.uint8), codes]), scales)[100:]
    assert np.array_equal(found.float().numpy(), np.where(np.isin(codes, (0x7F, 0xFF)), np.nan, wanted), equal_nan=True)


@pytest.mark.parametrize(("method", "power_of_two"), [("fp8", False), ("fp8", True), ("int4", False)])
def test_a_folder_is_quantised_and_turned_back_as_an_independent_computation_says(tmp_path, monkeypatch, method, power_of_two):
    monkeypatch.setattr("miles.convert.conversion.STRIP_BYTES", 20_000)  # several strips a matrix
    source = write_model(tmp_path / "hf", "deepseek_v3", **RAGGED)
    words = ["--power-of-two"] if power_of_two else []
    assert script("quantize", source, tmp_path / "small", "--method", method, *words).code == 0
    assert script("quantize", tmp_path / "small", tmp_path / "back", "--method", "bf16").code == 0
    given, small, back = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "small", "back"))
    assert given.keys() == back.keys()
    described = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    kept = {f"{name}.weight" for name in described["modules_to_not_convert" if method == "fp8" else "ignore"]}
    linear = {name for name in given if name.endswith(("proj.weight", "_mqa.weight"))}
    if method == "int4":
        linear = {name for name in linear if given[name].shape[1] % 32 == 0}
    assert kept == {name for name, tensor in given.items() if tensor.dim() == 2} - linear | {"lm_head.weight"}
    for name, tensor in given.items():
        if name not in linear:
            assert torch.equal(back[name], tensor), name
            continue
        values = tensor.float().numpy()
        if method == "fp8":
            codes, scales = small[name].view(torch.uint8).numpy(), small[f"{name}_scale_inv"].numpy()
            wanted = by_hand_fp8(codes, scales)
            for i in range(scales.shape[0]):
                for j in range(scales.shape[1]):
                    block = values[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
                    scale = abs(block).max() / np.float32(448)
                    scale = np.float32(2.0 ** np.ceil(np.log2(scale))) if power_of_two else scale
                    assert scales[i, j] == scale
                    ratio = block / scale
                    chosen = CODES[codes[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]]
                    assert (abs(chosen - ratio) == closest(ratio)).all()
        else:
            wanted = by_hand_int4(small[f"{name}_packed"].numpy(), small[f"{name}_scale"].float().numpy())
            assert small[f"{name}_shape"].tolist() == list(tensor.shape)
            scales = np.repeat(small[f"{name}_scale"].float().numpy(), 32, 1)
            assert (abs(wanted - values) <= scales / 2 + abs(values) * 2**-7).all(), "half a step, and the rounding of scale and product"
        assert np.array_equal(back[name].float().numpy(), wanted), name
    assert verify(tmp_path / "small", tmp_path / "back").equal == (method == "fp8"), "packed INT4 has other names"
    assert script("quantize", tmp_path / "small", tmp_path / "twice", "--method", method).err.count("already quantised") == 1


def test_an_fp8_folder_converts_to_what_its_bf16_folder_converts_to(tmp_path):
    source = write_model(tmp_path / "hf", "deepseek_v3", **RAGGED)
    quantize(source, tmp_path / "fp8", Target("fp8"))
    quantize(tmp_path / "fp8", tmp_path / "bf16", Target("bf16"))
    hf_to_torch_dist(tmp_path / "fp8", tmp_path / "td")
    assert verify(tmp_path / "bf16", tmp_path / "td").equal
    torch_dist_to_hf(tmp_path / "td", tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert verify(tmp_path / "bf16", tmp_path / "back").equal


@pytest.mark.parametrize(("method", "field"), [("fp8", "modules_to_not_convert"), ("int4", "ignore")])
def test_a_tied_head_is_told_to_be_kept_though_no_file_holds_it(tmp_path, method, field):
    quantize(write_model(tmp_path / "hf", "qwen3"), tmp_path / "small", Target(method))
    assert json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"][field] == ["lm_head", "model.embed_tokens"]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_transformers_loads_an_fp8_folder_with_the_values_that_we_read(tmp_path, family):
    from transformers import AutoModelForCausalLM

    even = {"hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "head_dim": 64}  # transformers wants blocks that come out even
    source = write_model(tmp_path / "hf", family, **even)
    quantize(source, tmp_path / "fp8", Target("fp8"))
    quantize(tmp_path / "fp8", tmp_path / "bf16", Target("bf16"))
    loaded, wanted = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16).state_dict() for name in ("fp8", "bf16"))
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


def test_experts_longer_than_a_buffer_and_single_numbers_are_kept(tmp_path):
    source = write_model(tmp_path / "hf", "llama4_text", hidden_size=768, intermediate_size=4096, num_local_experts=2, num_hidden_layers=2, vocab_size=16)
    given = load_file(source / "model.safetensors") | {"vision_model.scale": torch.tensor(3.0)}
    experts = "model.layers.1.feed_forward.experts.gate_up_proj"
    assert given[experts][0].nbytes > 8 << 20
    save_file(given, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, tmp_path / "small", Target("fp8"))
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert small["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(small[experts], given[experts])
    assert torch.equal(small["vision_model.scale"], torch.tensor(3.0))
