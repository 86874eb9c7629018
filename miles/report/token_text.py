"""The text of single tokens, by the tokenizer's own file. Without one (or without the tokenizers library) tokens are shown as ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miles.report.records import RunRecord

WINDOW = 6  # tokens of context that a token's text is cut out of
PART = "\ufffd"  # what a decoder writes for a part of a character


class TokenText:
    """Texts of token ids. `note` says why ids are shown instead, when they are."""

    def __init__(self, tokenizer: Any | None, note: str = "") -> None:
        self.tokenizer = tokenizer
        self.note = note

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One text a token; joined they are the decoded text. A token that ends inside a character has no text of its own yet."""
        if self.tokenizer is None:
            return [f"{number} " for number in ids]
        texts = []
        for index in range(len(ids)):
            window = [int(number) for number in ids[max(0, index - WINDOW) : index + 1]]
            before = self.tokenizer.decode(window[:-1], skip_special_tokens=False).rstrip(PART)
            after = self.tokenizer.decode(window, skip_special_tokens=False)
            texts.append("" if after.endswith(PART) else after[len(before) :])
        return texts


def find_tokenizer(record: RunRecord) -> Path | None:
    """tokenizer.json of the export, of the model the run started from, or of a checkpoint."""
    places = [record.run_dir.hf, record.run_dir.path / "model"]
    if record.setting("model.hf_checkpoint"):
        places.append(Path(str(record.setting("model.hf_checkpoint"))))
    if record.checkpoint is not None:
        places += [record.run_dir.checkpoint(record.checkpoint) / "hf", record.run_dir.checkpoint(record.checkpoint)]
    return next((place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()), None)


def load_token_text(record: RunRecord) -> TokenText:
    """The run's token texts, or ids with the reason."""
    path = find_tokenizer(record)
    if path is None:
        return TokenText(None, "Tokens are shown as ids: no tokenizer.json was found in the run's export or in its model folder.")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return TokenText(None, "Tokens are shown as ids: the tokenizers library is not installed here.")
    try:
        return TokenText(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception on a file it can't read
        return TokenText(None, f"Tokens are shown as ids: {path} could not be read ({' '.join(str(error).split())}).")
