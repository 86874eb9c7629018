"""What is refused, and by which words."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from miles.models.attention import miles_attention
from miles.models.load import build_model, load_model
from miles.models.registry import FAMILIES, family_of


def test_the_four_families():
    assert sorted(FAMILIES) == ["llama", "qwen2", "qwen3", "qwen3_moe"]
    assert family_of(LlamaConfig()) is FAMILIES["llama"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(), "'gpt2' is not supported; supported: llama, qwen2, qwen3, qwen3_moe"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act 'gelu'"),
        (Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=0), "sliding-window"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "rope_type 'dynamic'"),
    ],
)
def test_refused_by_name(config, words):
    with pytest.raises(ValueError, match=words):
        build_model(config)


def test_invariance_is_refused_where_it_does_not_exist():
    with pytest.raises(ValueError, match="float32 on cpu"):
        build_model(LlamaConfig(), dtype=torch.bfloat16, batch_invariant=True)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_model(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no safetensors"):
        load_model(tmp_path)


def test_attention_without_a_context_says_how_to_call_it():
    x = torch.zeros(1, 1, 2, 16)
    with pytest.raises(ValueError, match="miles_context"):
        miles_attention(torch.nn.Module(), x, x, x, None)
