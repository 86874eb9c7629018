"""The light tokenizer gives what transformers' gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from miles.config.exits import UserError
from miles.config.schema import RunConfig
from miles.data.sample import Draw
from miles.rollout.generate import supervised, tokenised
from miles.rollout.tokenizer import Tokenizer, byte_letters

TEXTS = ["State the final answer: 3 + 4 =", "Ünïcode ‽ 漢字 🙂\t\n", "", "a<|endoftext|>b", " leading and trailing "]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 4 ="}]


def test_fast_decoding_is_the_decoders(tmp_path: Path) -> None:
    """Any ids: cut characters, special tokens, added tokens with and without letters that stand for bytes, ids that no token has."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert {letter: bytes([number]) for letter, number in byte_letters().items()}.keys() == set(letters)
    backend = tokenizers.Tokenizer(models.BPE(vocab={word: index for index, word in enumerate([*letters, "Ġthe", "æ¼¢"])}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "Ġspecial"])
    backend.add_tokens(["<think>", "漢 字", "plain", tokenizers.AddedToken("Ġx", normalized=False)])
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    ours, random = Tokenizer(tmp_path), np.random.default_rng(0)
    assert ours._byte_level
    known = backend.get_vocab_size()
    for most in (known, known, known + 3):
        for length in range(200):
            ids = random.integers(0, most, length).tolist()
            assert ours.decode(ids) == backend.decode(ids, skip_special_tokens=True)
    for text in TEXTS:
        ids = [letters.index(next(letter for letter, number in byte_letters().items() if number == byte)) for byte in text.encode()]
        assert ours.decode(ids) == text


def test_like_transformers(tokenizer_folder: Path) -> None:
    ours, theirs = Tokenizer(tokenizer_folder), AutoTokenizer.from_pretrained(tokenizer_folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"]
        ids = theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_token_id == theirs.eos_token_id
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert ours.prompt(CHAT, True, {}, "data") == (expected, theirs(expected, add_special_tokens=False)["input_ids"])
    assert ours.prompt("hi", True, {}, "data")[0] == theirs.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False)


def test_a_bos_is_added_to_plain_text_only(tokenizer_folder: Path, tmp_path: Path) -> None:
    definition = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [1], "tokens": ["<|pad|>"]}},
    }
    definition["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    made = Tokenizer(tmp_path)
    plain = Tokenizer(tokenizer_folder).encode("1 2 3")
    assert made.encode("1 2 3") == [1, *plain]
    assert made.prompt([{"role": "user", "content": "1 2 3"}], True, {}, "data")[1] == plain


def test_learning_from_a_label(tokenizer_folder: Path) -> None:
    made = Tokenizer(tokenizer_folder)
    sample = supervised(Draw(3, "1 + 2 =", "3", source="warm_start"), RunConfig(seed=7), made)
    assert sample.token_id.tolist() == [*made.encode("1 + 2 ="), *made.encode("3"), made.eos_token_id]
    assert (sample.prompt_length, sample.response, sample.runs) == (len(made.encode("1 + 2 =")), "3", [])
    assert sample.turns == [(0, 0), (sample.prompt_length, 1)]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"tokenizer.json": None}, "has neither tokenizer.json nor an older vocabulary"),
        ({"tokenizer.json": "{"}, "not a tokenizer"),
        ({"tokenizer.json": None, "config.json": None}, "no such Hugging Face folder"),
        ({"tokenizer_config.json": "{}"}, "has no chat template; set apply_chat_template to false"),
        ({"tokenizer_config.json": '{"chat_template": "{{ raise_exception(\'no system role\') }}"}'}, "the chat template refuses a prompt: TemplateError: no system role"),
    ],
)
def test_faults(tokenizer_folder: Path, tmp_path: Path, change: dict[str, str | None], part: str) -> None:
    for path in tokenizer_folder.iterdir():
        content = change.get(path.name, path.read_text())
        if content is not None:
            (tmp_path / path.name).write_text(content)
    with pytest.raises(UserError, match=part) as caught:
        Tokenizer(tmp_path).prompt(CHAT, True, {}, "data")
    assert "\n" not in str(caught.value)


def test_prompts_that_do_not_fit(tokenizer_folder: Path) -> None:
    made, config = Tokenizer(tokenizer_folder), RunConfig(rollout={"sampling": {"max_prompt_len": 3}})
    with pytest.raises(UserError, match=r"data, draw 8: the prompt has \d+ tokens, more than rollout.sampling.max_prompt_len 3; raise it"):
        tokenised(Draw(8, "much too long a prompt"), config, made, config.rollout.sampling)
    with pytest.raises(UserError, match="data, draw 9: the prompt has no tokens"):
        tokenised(Draw(9, ""), config, made, None)
    with pytest.raises(UserError, match=r"list of chat messages; set data.apply_chat_template to true"):
        tokenised(Draw(9, CHAT), config, made, None)


def test_no_torch_in_service_and_worker() -> None:
    code = "import sys, miles.run.service, miles.run.worker; assert not {'torch', 'transformers', 'reasoning_gym'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
