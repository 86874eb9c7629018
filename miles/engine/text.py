"""Text of an engine that has a tokenizer: replies and stop strings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from miles.engine.sequence import Sequence

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: str) -> Any:
    """The folder's tokenizer, or None when it has none."""
    if not any((Path(folder) / name).exists() for name in FILES):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


class Text:
    """Decodes outputs and looks for stop strings."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def _decode(self, ids: list[int], sequence: Sequence) -> str:
        sampling = sequence.request.sampling
        return self._tokenizer.decode(
            ids, skip_special_tokens=sampling.skip_special_tokens, spaces_between_special_tokens=sampling.spaces_between_special_tokens
        )

    def stop_found(self, sequence: Sequence) -> str | None:
        """The stop string that the last token completed, or None. A stop string of n characters spans at most n + 1 tokens of
        one character or more; tokens that are parts of a character make it longer, hence the margin."""
        stops = sequence.request.sampling.stop
        tail = self._decode(sequence.output[-(4 * max(map(len, stops)) + 4) :], sequence)
        return next((stop for stop in stops if stop in tail), None)

    def reply(self, sequence: Sequence) -> str:
        """The output's text, without the stop token or string unless no_stop_trim."""
        reason, ids = sequence.finish or {}, sequence.output
        matched = reason.get("matched")
        trim = not sequence.request.sampling.no_stop_trim
        if trim and isinstance(matched, int):
            ids = ids[:-1]
        text = self._decode(ids, sequence)
        if trim and isinstance(matched, str) and matched in text:
            text = text[: text.rindex(matched)]
        return text
