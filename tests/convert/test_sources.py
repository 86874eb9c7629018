"""What sources of real life have beside plain weights: optimizer state, eyes, another way of naming layers."""

import json

import pytest
import torch
from convert_models import write_model
from safetensors.torch import load_file, save_file
from test_round_trip import equal, tensors

from miles.config.exits import UserError
from miles.convert.hf_to_torch_dist import hf_to_torch_dist
from miles.convert.look import inspect
from miles.convert.torch_dist_source import TorchDistSource
from miles.convert.torch_dist_to_hf import torch_dist_to_hf
from miles.convert.verify import verify


def training_checkpoint(folder, target):
    """A checkpoint as training leaves it, written by torch itself: the model in fp32, and Adam's moments and the master weights under the model's names."""
    import torch.distributed.checkpoint as dcp

    source, state = TorchDistSource(folder), {}
    for key, shape in source.shapes.items():
        state[key] = torch.empty(shape, dtype=source.dtypes[key])
        if shape:
            source.copy(key, (0,) * len(shape), state[key])
        for name in ("exp_avg", "exp_avg_sq", "fp32_param"):
            state[f"optimizer.state.{name}.{key}"] = torch.randn(shape)
    state["optimizer.param_groups"] = [{"lr": 1e-3, "step": 7}]
    state["rng_state"] = torch.zeros(5, dtype=torch.uint8)
    dcp.save(state, checkpoint_id=target, no_dist=True)
    (target.parent / "latest_checkpointed_iteration.txt").write_text("7\n")


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_optimizer_state_of_a_training_checkpoint_is_passed_over(tmp_path, family):
    source = write_model(tmp_path / "hf", family)
    hf_to_torch_dist(source, tmp_path / "td")
    training_checkpoint(tmp_path / "td", tmp_path / "run" / "iter_0000007")
    torch_dist_to_hf(tmp_path / "run", tmp_path / "back", source)
    given = {name: tensor.float() if "correction_bias" in name else tensor for name, tensor in tensors(source).items()}  # Megatron keeps it so
    assert equal(given, tensors(tmp_path / "back"))
    look = inspect(tmp_path / "run")
    assert look.bytes == inspect(tmp_path / "td").bytes
    assert look.other["optimizer"] == 3 * sum(4 * tensor.numel() for tensor in tensors(source).values())
    with pytest.raises(UserError, match=r"config\.json is missing; give the model's Hugging Face folder with --hf"):
        torch_dist_to_hf(tmp_path / "run", tmp_path / "other")


@pytest.mark.parametrize(
    ("family", "outer", "prefix"),
    [("llama4_text", "llama4", "language_model."), ("gemma3_text", "gemma3", "language_model."), ("gemma3n_text", "gemma3n", "model.language_model.")],
)
def test_text_models_inside_models_with_eyes(tmp_path, family, outer, prefix):
    source = write_model(tmp_path / "hf", family)
    text = load_file(source / "model.safetensors")
    inside = {prefix + name.removeprefix("model.") if outer == "gemma3n" else prefix + name: tensor for name, tensor in text.items()}
    eyes = {"vision_tower.patch.weight": torch.randn(3, 4), "multi_modal_projector.weight": torch.randn(4, 3)}
    save_file(inside | eyes, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({"model_type": outer, "text_config": config, "vision_config": {"hidden_size": 4}}))
    report = hf_to_torch_dist(source, tmp_path / "td")
    assert report.warnings == ["2 tensors beside the text model are left out, such as multi_modal_projector.weight"]
    torch_dist_to_hf(tmp_path / "td", tmp_path / "back")
    assert equal(inside, tensors(tmp_path / "back"))
    verdict = verify(source, tmp_path / "td")
    assert (verdict.only_first, verdict.only_second, verdict.different) == (sorted(eyes), [], [])
