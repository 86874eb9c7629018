"""SmolLM2's conversion: the command's faults here; the conversion itself where gguf and the file are at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from miles.config.compose import load_config
from miles.recipes import smollm2

GGUF = os.environ.get("MILES_SMOLLM2_GGUF")  # path of SmolLM2-135M-Instruct.Q4_1.gguf


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "miles.recipes.smollm2", *arguments], capture_output=True, text=True)


def test_a_missing_file_is_told_in_one_line(tmp_path: Path) -> None:
    done = run(str(tmp_path / "model"), "--gguf", str(tmp_path / "absent.gguf"))
    assert done.returncode == 78
    assert done.stderr.splitlines() == [f"no file {tmp_path}/absent.gguf: pass the SmolLM2 .gguf file, or leave out --gguf to download it"]
    assert not (tmp_path / "model").exists()


def test_a_folder_that_exists_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="exists already: remove it or name another folder"):
        smollm2.convert(tmp_path / "some.gguf", tmp_path / "model")


def test_a_file_that_is_no_gguf_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    (tmp_path / "some.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(ValueError, match=r"some\.gguf: not a GGUF file .*; download it again"):
        smollm2.convert(tmp_path / "some.gguf", tmp_path / "out" / "model")
    assert not (tmp_path / "out").exists()


def test_the_recipe_is_three_steps_in_fp32_on_the_cpu() -> None:
    config = load_config(["recipes/smollm2_135m"])
    assert (config.num_rollout, config.model.dtype, config.cluster.device, config.rollout.engine) == (3, "float32", "cpu", "embedded")
    assert config.model.build == f"{smollm2.__name__}.{smollm2.build.__name__}"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("7 + 5 equals 12.", 1.0), ("12", 1.0), ("12.0 apples", 1.0), ("It is 12, not 13.", 0.0), ("7 + 5", 0.0), ("-12", 0.0), ("1,200", 0.0),
        ("twelve", 0.0), ("", 0.0), (None, 0.0),
    ],
)  # fmt: skip
def test_the_last_number_is_the_answer(response: str | None, reward: float) -> None:
    assert smollm2.last_number([SimpleNamespace(response=response, label="12")], None) == [reward]


@pytest.mark.skipif(GGUF is None, reason="MILES_SMOLLM2_GGUF does not name the GGUF file")
def test_the_converted_model_speaks(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert GGUF is not None
    smollm2.convert(Path(GGUF), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.model_type == "llama"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.tokenize("12 cats") == ["1", "2", "Ġcats"]
    assert tokenizer.decode(tokenizer("it 's , so . 日本")["input_ids"]) == "it 's , so . 日本"
