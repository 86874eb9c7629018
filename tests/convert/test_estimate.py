"""What --estimate says of every model in configs/models: against the models' cards, and against transformers' own modules of these dimensions."""

import json
import subprocess
import sys

import pytest
import torch
from scripts import TOOLS, script

from miles.config.compose import configs_dir
from miles.config.exits import WRONG
from miles.config.schema import Shape
from miles.config.yaml_file import read_yaml
from miles.convert.estimate import fields_of

# As the models' cards count them, without multi-token prediction, and less eyes and ears [10^9].
CARDS = {
    "deepseek-v3": 671.0, "deepseek-r1": 671.0, "deepseek-v32": 671.9, "kimi-k2": 1026.4, "glm4.5-106b-a12b": 106.9, "glm4.5-355b-a32b": 352.8,
    "glm4.6-355b-a32b": 352.8, "minimax-m2": 228.7, "qwen3-30b-a3b": 30.53, "qwen3-235b-a22b": 235.1, "qwen3-0.6b": 0.596, "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02, "qwen3-8b": 8.19, "qwen3-14b": 14.77, "qwen3-32b": 32.76, "qwen2.5-0.5b": 0.494, "qwen2.5-1.5b": 1.544, "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.62, "qwen2.5-32b": 32.76, "llama3.1-8b-instruct": 8.03, "llama3.1-70b-instruct": 70.55, "llama3.1-405b-instruct": 405.9,
    "llama3.2-1b-instruct": 1.236, "llama3.2-3b-instruct": 3.21, "llama3.3-70b-instruct": 70.55, "llama4-scout-17b-16e": 107.8,
    "llama4-maverick-17b-128e": 400.7, "gemma2-2b": 2.614, "gemma2-9b": 9.24, "gemma2-27b": 27.23, "gemma3-1b": 1.0, "gemma3-4b": 3.88, "gemma3-12b": 11.77,
    "gemma3-27b": 27.01, "gemma3n-e2b": 4.46, "gemma3n-e4b": 6.87,
}  # fmt: skip
UNCOUNTED = {"glm4.7-flash"}
UNKNOWN = {"gemma-4-31b-it": "names no family", "glm4-32b": "is not known; known: llama", "mimo-7b-rl": "names no family"}


def by_transformers(name):
    """Parameters of transformers' model of these dimensions, without memory; with the router's bias, which is a buffer there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in fields_of(Shape.model_validate(read_yaml(configs_dir() / "models" / f"{name}.yaml")[0]["model"]["shape"])).items() if value is not None}
    kind = {"kimi_k2": "deepseek_v3"}.get(fields["model_type"], fields["model_type"])
    del fields["model_type"]
    if "kv_lora_rank" in fields:
        fields.pop("head_dim", None)  # it stands for the part that turns
    if kind == "deepseek_v3":
        fields["num_local_experts"] = fields["n_routed_experts"]
    if kind == "gemma3n_text":
        fields["num_kv_shared_layers"] = 0  # published files hold keys and values of these layers, transformers' modules do not
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    biases = [buffer for buffer_name, buffer in model.named_buffers() if buffer_name.endswith("correction_bias")]
    return sum(tensor.numel() for tensor in [*model.parameters(), *biases])


def test_every_model_is_told_of_here():
    assert {path.stem for path in (configs_dir() / "models").glob("*.yaml")} == {*CARDS, *UNCOUNTED, *UNKNOWN}


@pytest.mark.parametrize("name", [*CARDS, *UNCOUNTED])
def test_parameters_are_those_of_the_card_and_of_transformers(name):
    done = script("hf_to_torch_dist", "--hf", name, "--estimate", "--json")
    found = json.loads(done.out)
    if name in CARDS:
        assert found["parameters"] / 1e9 == pytest.approx(CARDS[name], rel=2e-3)
    assert found["parameters"] == by_transformers(name)
    assert found["bytes"] == 2 * found["parameters"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_family_without_a_map_is_refused_by_name(name):
    done = script("hf_to_torch_dist", "--hf", name, "--estimate")
    assert done.code == WRONG
    (line,) = done.err.splitlines()
    assert f"configs/models/{name}.yaml" in line
    assert UNKNOWN[name] in line


def test_the_script_says_bytes_memory_and_time():
    command = [sys.executable, str(TOOLS / "hf_to_torch_dist.py"), "--hf", "deepseek-v3", "--estimate", "--workers", "8", "--disk", "2", "--mtp-num-layers", "1"]
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert plain[0].startswith("deepseek_v3: 682.")  # 11.5 B more for the MTP layer without its copies of the embedding and the head
    assert plain[1].startswith("writes 1.37 TB (bfloat16) into ")
    assert json.loads(script("hf_to_torch_dist", *command[2:], "--json").out)["memory"] < 5e8
