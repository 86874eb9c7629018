"""The family maps by model_type, and the family of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.config.exits import UserError
from miles.config.json_file import read_object
from miles.models.maps.deepseek import DEEPSEEK_V3, DEEPSEEK_V32, GLM4_MOE_LITE
from miles.models.maps.entry import Config
from miles.models.maps.family import Map, check
from miles.models.maps.gemma import GEMMA2, GEMMA3, GEMMA3N
from miles.models.maps.glm import GLM4_MOE
from miles.models.maps.llama import LLAMA
from miles.models.maps.llama4 import LLAMA4
from miles.models.maps.minimax import MINIMAX_M2
from miles.models.maps.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE

MAPS: dict[str, Map] = {
    kind: family
    for family in (
        LLAMA, LLAMA4, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, DEEPSEEK_V3, DEEPSEEK_V32, GLM4_MOE, GLM4_MOE_LITE, MINIMAX_M2, GEMMA2, GEMMA3, GEMMA3N,
    )
    for kind in family.model_types
}  # fmt: skip
# Models with eyes keep their text model one level down, in the file's names and in config.json.
WITH_TEXT_INSIDE = {"llama4": "language_model.", "gemma3": "language_model.", "gemma3n": "model.language_model."}


@dataclass(frozen=True)
class Known:
    """A model whose map is known: what its config says, and what the names of its text model begin with ("" or "language_model.")."""

    family: Map
    config: Config
    prefix: str = ""

    def full(self, name: str) -> str:
        """A tensor's name in the files, from its name in a text model's. Gemma 3N's text model is `model` itself there, one level down."""
        return self.prefix + (name.removeprefix("model.") if self.prefix.startswith("model.") else name)

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", self.family.tied))

    @property
    def mtp_layers(self) -> int:
        """MTP layers that config.json tells of."""
        return self.config.number("num_nextn_predict_layers", 0) if self.family.mtp else 0


def known(fields: Mapping[str, Any], where: str) -> Known:
    """The family of a config.json's fields. UserError for an unknown one, and for a field that its map does not understand."""
    kind, prefix, config = fields.get("model_type"), "", Config(fields, where)
    if isinstance(kind, str) and kind in WITH_TEXT_INSIDE and isinstance(fields.get("text_config"), dict):
        inner = {"model_type": f"{kind}_text", **fields["text_config"]}
        inner.setdefault("tie_word_embeddings", fields.get("tie_word_embeddings"))
        kind, prefix, config = inner["model_type"], WITH_TEXT_INSIDE[kind], Config(inner, where)
    if not isinstance(kind, str) or kind not in MAPS:
        raise UserError(f"{where}: model_type {kind!r} is not known; known: {', '.join(MAPS)}")
    family = MAPS[kind]
    check(family, config)
    return Known(family, config, prefix)


def known_folder(folder: str | Path) -> Known:
    """The family of a Hugging Face folder."""
    path = Path(folder) / "config.json"
    return known(read_object(path), str(path))
