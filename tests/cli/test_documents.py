"""What README.md and docs/your_own_data.md show is copied here and done: files, commands, and what they answer."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from miles.cli.run import FREE, MAY_CHANGE
from miles.config.compose import load_config
from miles.data.prompts import load_prompts
from miles.data.sample import Sample
from miles.rollout.builtin_rewards import RewardContext

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
OWN_DATA = (ROOT / "docs/your_own_data.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def submit(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    return subprocess.run([sys.executable, "-m", "miles.cli", *words], cwd=folder, env=env, capture_output=True, text=True)


def test_refusals_in_the_readme_are_true(tmp_path: Path) -> None:
    (shown,) = [block for block in blocks(README, "") if block.startswith("$ ")]
    examples = re.findall(r"^\$ miles-submit (.*)\n(.*)\n", shown, re.MULTILINE)
    assert len(examples) == 2
    for command, answer in examples:
        done = submit(shlex.split(command), tmp_path)
        assert (done.returncode, done.stderr.rstrip("\n")) == (78, answer)
    mended = submit([*shlex.split(examples[0][0])[:-1], "120"], tmp_path)
    assert mended.returncode == 0, mended.stdout + mended.stderr


def test_the_readme_names_every_setting_that_may_change() -> None:
    (shown,) = [block for block in blocks(README, "") if block.startswith("num_rollout")]
    assert set(re.findall(r"[a-z_]+(?:\.[a-z_]+)+(?!\.\*)\b|num_rollout", shown)) - {"cluster"} == MAY_CHANGE | {"train.optimizer.lr_decay_steps"}
    assert {section for section in re.findall(r"([a-z_.]+\.)\*", shown)} == set(FREE)


def test_every_page_of_the_docs_is_in_the_readme() -> None:
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == set(re.findall(r"^\| \[docs/(\S+\.md)\]", README, re.MULTILINE))


def model_folder(folder: Path) -> None:
    """As much of a Hugging Face folder as `check` looks at."""
    folder.mkdir(parents=True)
    shape = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16, "intermediate_size": 16}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"model.norm.weight": np.ones(8, np.float32)}, folder / "model.safetensors")


def test_your_own_data(tmp_path: Path) -> None:
    (rows,), (recipe,), (function,) = blocks(OWN_DATA, "json"), blocks(OWN_DATA, "yaml"), blocks(OWN_DATA, "python")
    (tmp_path / "train.jsonl").write_text(rows)
    (tmp_path / "legs.yaml").write_text(recipe)
    (tmp_path / "reward.py").write_text(function)
    config = load_config([tmp_path / "legs.yaml"])
    model_folder(tmp_path / str(config.model.hf_checkpoint))
    (check,) = re.findall(r"^miles-submit (check .*)$", OWN_DATA, re.MULTILINE)
    done = submit([*check.split(), "--json"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    assert [finding for finding in found["findings"] if finding["level"] != "note"] == []
    assert found["summary"]["reward"] == "reward.score"
    assert len(rows.splitlines()) == found["config"]["rollout"]["batch_size"]
    assert score_of_the_page(tmp_path, load_config([tmp_path / "legs.yaml"], [f"data.prompt_data={tmp_path / 'train.jsonl'}"])) == [1.0, 0.1, 0.0]


def score_of_the_page(folder: Path, config) -> list[float]:
    """The page's function on three answers to its first row."""
    spec = importlib.util.spec_from_file_location("reward_of_the_page", folder / "reward.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    draw = load_prompts(config)["data"].draw(0, 0)
    empty = np.zeros(0, np.float32)
    rows = {"12": "3 dogs have 12", "13": "It is 13.", "none": "I do not know"}
    samples = [
        Sample(0, index, 0, empty.astype(np.int32), 0, empty, empty.astype(np.uint8), empty.astype(np.uint8), label="12", response=response, prompt=str(draw.prompt), metadata=draw.metadata)
        for index, response in enumerate(rows.values())
    ]
    return module.score(samples, RewardContext(draw, config.rollout.reward, config))


def test_help_and_version(tmp_path: Path) -> None:
    import importlib.metadata

    short, long = submit(["run", "-h"], tmp_path), submit(["run", "--help"], tmp_path)
    assert short.returncode == long.returncode == 0
    assert short.stdout == long.stdout
    assert "--run-dir" in short.stdout
    version = submit(["--version"], tmp_path)
    assert (version.returncode, version.stdout.strip()) == (0, f"miles {importlib.metadata.version('miles')}")
