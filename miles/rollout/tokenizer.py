"""Text to tokens and back, from the files of a Hugging Face folder.

transformers.AutoTokenizer costs seconds of import and pulls in torch; `tokenizers` alone reads tokenizer.json in milliseconds
and is what AutoTokenizer runs underneath. A folder without tokenizer.json falls back to AutoTokenizer, once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from miles.config.exits import UserError
from miles.data.prompts import Prompt

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

VOCABULARIES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class Tokenizer:
    """The tokenizer of a model folder. `hash`: xxh3_64 of its definition, for manifests."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        text = path.read_text(encoding="utf-8") if path.is_file() else _converted(self.folder)
        import tokenizers

        try:
            self._backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path}: not a tokenizer ({' '.join(str(error).split())[:200]})") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self.hash = xxhash.xxh3_64_hexdigest(text.encode())
        self.config = _json(self.folder / "tokenizer_config.json")
        self.special = {name: _content(self.config[name]) for name in SPECIAL if self.config.get(name)}
        self.eos_token_id = self._eos()
        self._byte_level = (json.loads(text).get("decoder") or {}).get("type") == "ByteLevel"

    def _eos(self) -> int | None:
        """End of a learnt response: the tokenizer's own eos, else the model's (the first, where it has several)."""
        token = self.special.get("eos_token")
        if token is not None and (found := self._backend.token_to_id(token)) is not None:
            return int(found)
        for name in ("generation_config.json", "config.json"):
            value = _json(self.folder / name).get("eos_token_id")
            if isinstance(value, list) and value:
                return int(value[0])
            if isinstance(value, int):
                return value
        return None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a text (such as a bos)."""
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        if self._byte_level:
            table = self._bytes
            with contextlib.suppress(KeyError):  # an id that no token has
                return b"".join([table[token] for token in ids]).decode("utf-8", "replace")
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        """The bytes of every token, by a byte-level decoder's rule; special tokens have none. Ten times as fast as the decoder itself."""
        letters = byte_letters()
        table = {}
        for token, number in self._backend.get_vocab(with_added_tokens=True).items():
            try:
                table[number] = bytes([letters[letter] for letter in token])
            except KeyError:  # an added token with other letters stands for itself
                table[number] = token.encode()
        return table | {number: b"" for number, token in self._backend.get_added_tokens_decoder().items() if token.special}

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Messages as text by the folder's chat template, ready for a response. Raises UserError without a template."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[messages], **{"chat_template": self.template(), "add_generation_prompt": True, **self.special, **options}
            )
        except UserError:
            raise
        except Exception as error:  # a template may raise anything
            raise UserError(f"{self.folder}: the chat template refuses a prompt: {type(error).__name__}: {' '.join(str(error).split())}") from error
        return str(rendered[0][0])

    def template(self) -> str:
        """The chat template: chat_template.jinja, or the one in tokenizer_config.json."""
        file = self.folder / "chat_template.jinja"
        template = file.read_text(encoding="utf-8") if file.is_file() else self.config.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str):
            raise UserError(f"{self.folder}: has no chat template; set apply_chat_template to false, or add chat_template.jinja")
        return template

    def prompt(self, prompt: Prompt, apply_chat_template: bool, options: dict[str, Any], source: str) -> tuple[str, list[int]]:
        """(text, token ids) of a prompt. A template brings its own special tokens, so none are added to its text."""
        if not apply_chat_template:
            if not isinstance(prompt, str):
                raise UserError(f"{source}: the prompt is a list of chat messages; set {source}.apply_chat_template to true")
            return prompt, self.encode(prompt)
        text = self.chat([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, **options)
        return text, self.encode(text, special=False)


def byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary: itself where it is printable in Latin-1, else one from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [number for number in range(256) if number not in plain]
    return {chr(number): number for number in plain} | {chr(256 + index): number for index, number in enumerate(others)}


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _converted(folder: Path) -> str:
    """tokenizer.json's text for a folder that has only the older files."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no such Hugging Face folder (no config.json); set model.hf_checkpoint")
    # Without any vocabulary transformers makes an empty tokenizer, and says nothing.
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{folder}: has neither tokenizer.json nor an older vocabulary ({', '.join(VOCABULARIES)}); copy the tokenizer's files there")
    from transformers import AutoTokenizer

    try:
        return str(AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: no tokenizer.json, and transformers can't make one: {' '.join(str(error).split())[:200]}") from error
