"""FP8 blocks and INT4 groups against formulas written out, and whole folders there and back."""

import json

import pytest
import torch
from convert_models import write_model
from safetensors.torch import load_file

from miles.config.exits import UserError
from miles.convert.quantize import Target, quantize
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


@pytest.mark.parametrize("method", ["fp8", "int4"])
def test_folder_there_and_back(tmp_path, method):
    source = write_model(tmp_path / "hf", "qwen3_moe")
    quantize(source, tmp_path / "small", Target(method))
    quantize(tmp_path / "small", tmp_path / "back", Target("bf16"))
    given, back = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert given.keys() == back.keys()
    assert torch.equal(given["model.layers.0.mlp.gate.weight"], back["model.layers.0.mlp.gate.weight"])
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    assert 0 < (given[name].float() - back[name].float()).abs().max() < 0.2 * given[name].abs().max()
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == ("fp8" if method == "fp8" else "compressed-tensors")
    with pytest.raises(UserError, match="already quantised"):
        quantize(tmp_path / "small", tmp_path / "twice", Target(method))
