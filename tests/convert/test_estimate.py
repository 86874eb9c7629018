"""What --estimate says for models whose number of parameters is public."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from miles.config.compose import configs_dir
from miles.config.exits import UserError
from miles.convert.estimate import estimate

TOOL = Path(__file__).parents[2] / "tools/convert/hf_to_torch_dist.py"
# As the models' cards count them, without multi-token prediction and without eyes [10^9].
PARAMETERS = {
    "deepseek-v3": 671.0, "deepseek-r1": 671.0, "deepseek-v32": 671.9, "kimi-k2": 1026.4, "glm4.5-106b-a12b": 106.9, "glm4.5-355b-a32b": 352.8,
    "glm4.6-355b-a32b": 352.8, "minimax-m2": 228.7, "qwen3-30b-a3b": 30.53, "qwen3-235b-a22b": 235.1, "qwen3-0.6b": 0.596, "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02, "qwen3-8b": 8.19, "qwen3-14b": 14.77, "qwen3-32b": 32.76, "qwen2.5-0.5b": 0.494, "qwen2.5-1.5b": 1.544, "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.62, "qwen2.5-32b": 32.76, "llama3.1-8b-instruct": 8.03, "llama3.2-3b-instruct": 3.21, "llama3.3-70b-instruct": 70.55,
    "llama4-scout-17b-16e": 107.8, "gemma2-2b": 2.614, "gemma3-4b": 3.88,
}  # fmt: skip
UNKNOWN = {"gemma-4-31b-it", "glm4-32b", "mimo-7b-rl"}  # families without a map
UNCOUNTED = {"glm4.7-flash"}


def test_every_model_has_an_estimate_or_is_refused_by_name():
    names = {path.stem for path in (configs_dir() / "models").glob("*.yaml")}
    assert names == {*PARAMETERS, *UNKNOWN, *UNCOUNTED}
    for name in sorted(UNKNOWN):
        with pytest.raises(UserError, match=r"names no family|is not known; known: llama"):
            estimate(name)
    for name in sorted(UNCOUNTED):
        assert estimate(name).bytes > 0


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_models_card(name):
    found = estimate(name)
    assert found.parameters / 1e9 == pytest.approx(PARAMETERS[name], rel=2e-3)
    assert found.bytes == 2 * found.parameters


def test_the_script_says_bytes_memory_and_time():
    command = [sys.executable, str(TOOL), "--hf", "deepseek-v3", "--estimate", "--workers", "8", "--disk", "2", "--mtp-num-layers", "1"]
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert plain[0].startswith("deepseek_v3: 682.")  # 11.5 B more for the MTP layer without its copies of the embedding and the head
    assert plain[1].startswith("writes 1.37 TB (bfloat16) into ")
    assert json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)["memory"] < 5e8
