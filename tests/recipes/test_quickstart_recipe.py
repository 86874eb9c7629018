"""The quickstart's model, tokenizer, prompts and demonstrations, made on the spot."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from miles.config.compose import load_config
from miles.data.prompts import load_prompts, normalise
from miles.recipes import quickstart
from miles.rollout.demonstrations import with_responses

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recipe") / "deep" / "model"
    quickstart.build(made, 1234)
    return made


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_same_seed_same_bytes_in_another_process(folder: Path, tmp_path: Path) -> None:
    code = "import sys, pathlib; from miles.recipes.quickstart import build; build(pathlib.Path(sys.argv[1]), 1234)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, env={"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "2"})
    assert digests(folder) == digests(tmp_path / "again")
    assert set(digests(folder)) == FILES


def test_another_seed_changes_the_weights_alone(folder: Path, tmp_path: Path) -> None:
    quickstart.build(tmp_path / "other", 1235)
    ours, other = digests(folder), digests(tmp_path / "other")
    assert {name for name in FILES if ours[name] != other[name]} == {"model.safetensors"}


def test_building_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    quickstart.build_tiny(tmp_path / "tiny", 9)
    assert torch.equal(torch.rand(4), expected)


def test_a_folder_that_exists_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already: remove it"):
        quickstart.build(tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_folder_loads_as_a_mixture_of_experts(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen3_moe"
    assert model.config.num_experts == 8
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    "text",
    ["", "Calculate 4 + 10 + 7 + 0.", "  two  spaces\nand lines\r\n\t", "naïve Ærøskøbing — 日本語 🙂 e\u0301", "\x00\x01\x7f\u0080\uffff", "don't 'quote' , . !"],
)
def test_text_survives_the_tokenizer(folder: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_byte_is_a_token(folder: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(set(pre_tokenizers.ByteLevel.alphabet())) == 256
    assert all(tokenizer.token_to_id(character) is not None for character in pre_tokenizers.ByteLevel.alphabet())


def test_digits_are_tokens_of_their_own_and_prompts_are_short(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.decode([token]) for token in tokenizer("1234567890")["input_ids"]] == list("1234567890")
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and any(c.isdigit() for c in token)]
    assert len(tokenizer("Calculate 10 + 10 + 10 + 10.")["input_ids"]) <= 13
    assert len(tokenizer("Calculate 4 + 3 + 7 + 0.")["input_ids"]) <= 9


def test_the_recipe_asks_for_the_task_that_the_tokenizer_was_made_for() -> None:
    config = load_config(["recipes/quickstart"])
    for source in (config.warm_start, config.data, config.eval):
        assert source.reasoning_gym == quickstart.TASK
        assert {key: value for key, value in source.reasoning_gym_config.items() if key not in ("seed", "size")} == quickstart.TASK_CONFIG


@pytest.mark.parametrize("recipe", ["quickstart", "tiny"])
def test_no_prompt_occurs_in_two_sets(recipe: str) -> None:
    """Read from reasoning-gym directly for the raw sets, which do overlap: else the check would prove nothing."""
    import reasoning_gym

    config = load_config([f"recipes/{recipe}"])
    sets = load_prompts(config)
    texts = {name: [" ".join(str(row.prompt).lower().split()) for row in prompts.rows] for name, prompts in sets.items()}
    assert set(texts) == {"warm_start", "data", "eval"}
    for one, other in (("warm_start", "data"), ("warm_start", "eval"), ("data", "eval")):
        assert not set(texts[one]) & set(texts[other])
    if recipe == "quickstart":
        assert len(set(texts["eval"])) >= 256
        raw = {
            name: {entry["question"] for entry in reasoning_gym.create_dataset(source.reasoning_gym, **source.reasoning_gym_config)}
            for name, source in (("warm_start", config.warm_start), ("data", config.data), ("eval", config.eval))
        }
        assert raw["warm_start"] & raw["data"]
        assert raw["data"] & raw["eval"]


def test_demonstrations_are_two_right_and_three_rounded_down() -> None:
    assert sorted(quickstart.demonstrations("Calculate 9 + 9 + 4 + 1.", "23", {})) == ["20", "20", "20", "23", "23"]
    assert set(quickstart.demonstrations("Calculate 1 + 1 + 4 + 1.", "7", {})) == {"0", "7"}
    assert quickstart.demonstrations("Calculate 10 + 10 + 5 + 5.", "30", {}) == ["30"] * 5


def test_warm_start_learns_every_demonstration() -> None:
    config = load_config(["recipes/quickstart"])
    prompts = load_prompts(config)["warm_start"]
    learnt = with_responses(prompts, config.warm_start)
    assert len(learnt) == 5 * len(prompts)
    first = normalise(prompts.rows[0].prompt)
    total = sum(int(term) for term in first.removeprefix("calculate").rstrip(".").split("+"))
    labels = [row.label for row in learnt.rows if normalise(row.prompt) == first]
    assert sorted(labels, key=str) == sorted([str(total)] * 2 + [str(total - total % 10)] * 3)
    assert learnt.shuffle, "in file order, a batch would hold five times the same question"
