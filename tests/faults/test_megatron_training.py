"""What megatron-core's own training saves, optimizer and all, as a Hugging Face folder."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from convert_models import write_model
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import run_ranks

from miles.convert.hf_to_torch_dist import hf_to_torch_dist
from miles.convert.look import inspect
from miles.convert.options import Options
from miles.convert.torch_dist_source import TorchDistSource
from miles.convert.torch_dist_to_hf import torch_dist_to_hf
from miles.convert.verify import verify


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed: make test-faults installs it")
@pytest.mark.parametrize(("family", "mtp"), [("qwen3_moe", 0), ("deepseek_v3", 1)])
def test_what_training_with_the_distributed_optimizer_saves_converts_back(tmp_path, family, mtp):
    from transformers import AutoModelForCausalLM

    source = write_model(tmp_path / "hf", family, mtp)
    hf_to_torch_dist(source, tmp_path / "td", Options(mtp_layers=mtp))
    (tmp_path / "run").mkdir()
    run_ranks.run(
        2, "megatron_training.step_and_save", tmp_path / "ranks", hf=str(source), checkpoint=str(tmp_path / "td" / "release"), run=str(tmp_path / "run"), mtp=mtp
    )
    torch_dist_to_hf(tmp_path / "run", tmp_path / "back", source)
    changed = {entry["name"] for entry in verify(source, tmp_path / "back").different}
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.experts.0.down_proj.weight"} <= changed
    found = load_file(tmp_path / "run" / "logits.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (model(found["tokens"]).logits - found["logits"]).abs().max() < 1e-5
    optimizer = {key: shape for key, shape in TorchDistSource(tmp_path / "run").shapes.items() if key.startswith("optimizer.")}
    assert {key.split(".")[2] for key in optimizer} >= {"exp_avg", "exp_avg_sq"}
    assert inspect(tmp_path / "run").mtp_layers == mtp
