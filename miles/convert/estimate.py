"""What a conversion will take, before it: bytes, memory, time. From config.json alone, or from a name of configs/models, so that it works before the download."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miles.config.compose import configs_dir
from miles.config.exits import UserError
from miles.config.schema import Shape
from miles.config.yaml_file import read_yaml
from miles.convert.conversion import FILE_BYTES, FILES, SMALLEST_FILE
from miles.convert.options import DTYPES, check_mtp
from miles.convert.output import BUFFER_BYTES
from miles.models.maps.find import Known, known, known_folder
from miles.models.maps.pieces import padded_vocabulary, pieces

GB_PER_SECOND = 1.0  # of one node's disk, where none is given
# What no Shape states, the same in all models of a family: DeepSeek-V3.2's indexer, Gemma 3N's own parts.
OWN = {
    "deepseek_v32": {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048},
    "gemma3n_text": {"altup_num_inputs": 4, "laurel_rank": 64, "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144},
}


@dataclass(frozen=True)
class Estimate:
    """bytes: of the checkpoint in `dtype`; memory: anonymous, a process; seconds: at the given GB/s."""

    family: str
    parameters: int
    tensors: int
    bytes: int
    files: int
    memory: int
    seconds: float
    dtype: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(model: str | Path, mtp_layers: int = 0, divisible_by: int = 1, workers: int = 1, rate: float = GB_PER_SECOND, dtype: str = "bfloat16") -> Estimate:
    """Of converting a folder with a config.json, or a model of configs/models, to torch_dist."""
    found = _known(model)
    check_mtp(found, mtp_layers, found.config.where)
    rows = padded_vocabulary(found.config.number("vocab_size"), divisible_by, 1)
    total, keys = 0, set()
    for piece in pieces(found, mtp_layers=mtp_layers, rows=rows):
        count = 1
        for number in piece.shape:
            count *= number
        total += count
        keys.add(piece.key)
    amount = DTYPES[dtype].itemsize * total
    files = -(-amount // min(FILE_BYTES, max(SMALLEST_FILE, amount // FILES)))
    return Estimate(str(found.config.get("model_type")), total, len(keys), amount, files, 2 * BUFFER_BYTES * workers, amount / 1e9 / rate, dtype)


def _known(model: str | Path) -> Known:
    named = {file.stem: file for file in (configs_dir() / "models").glob("*.yaml")}
    if Path(model).exists():
        return known_folder(model)
    if str(model) not in named:
        near = difflib.get_close_matches(str(model), named, 1)
        raise UserError(f"{model}: no folder, and no name of configs/models{f' ({near[0]} is one)' if near else ''}; give a folder with a config.json, or a name from there")
    return _named(named[str(model)])


def _named(file: Path) -> Known:
    shape = Shape.model_validate(read_yaml(file)[0]["model"]["shape"], strict=True)
    if shape.family is None:
        raise UserError(f"{file}: its shape names no family; give a folder with a config.json")
    return known(fields_of(shape), str(file))


def fields_of(shape: Shape) -> dict[str, Any]:
    """A config.json's fields with these dimensions, under the names that its family uses. Of Qwen2, Gemma and the like only what changes sizes."""
    kind = str(shape.family)
    fields: dict[str, Any] = {
        "model_type": kind, "num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "intermediate_size": shape.ffn, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "vocab_size": shape.vocab, "tie_word_embeddings": shape.tied,
    }  # fmt: skip
    if kind == "glm4_moe":
        fields |= {"attention_bias": shape.qkv_bias, "use_qk_norm": shape.qk_norm}
    if shape.kv_lora:
        fields |= {
            "q_lora_rank": shape.q_lora, "kv_lora_rank": shape.kv_lora, "qk_nope_head_dim": shape.qk_nope, "qk_rope_head_dim": shape.qk_rope,
            "v_head_dim": shape.v_head,
        }  # fmt: skip
    fields |= OWN.get(kind, {})
    if not shape.experts:
        return fields
    if kind == "llama4_text":
        return fields | {
            "num_local_experts": shape.experts, "intermediate_size": shape.expert_ffn, "intermediate_size_mlp": shape.ffn,
            "interleave_moe_layer_step": shape.moe_every,
        }  # fmt: skip
    if kind == "minimax_m2":
        return fields | {"num_local_experts": shape.experts, "intermediate_size": shape.expert_ffn}
    fields["moe_intermediate_size"] = shape.expert_ffn
    if kind in ("qwen2_moe", "qwen3_moe"):
        return fields | {"num_experts": shape.experts} | ({"shared_expert_intermediate_size": shape.shared_ffn} if shape.shared_ffn else {})
    return fields | {"n_routed_experts": shape.experts, "n_shared_experts": shape.shared_ffn // shape.expert_ffn, "first_k_dense_replace": shape.dense_layers}
