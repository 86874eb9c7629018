"""Tiny models of the families with what transformers computes of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))
from convert_models import write_model

from miles.convert.hf_to_torch_dist import Options, hf_to_torch_dist
from miles.models.maps.find import known_folder

TOKENS = ((2, 32), (3, 24))  # sequences of each data-parallel rank; lengths differ, as micro-batches do
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 500.0}
# name: (family, MTP layers, changes of convert_models' configuration)
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama": ("llama", 0, {"rope_parameters": LLAMA3}),
    "llama4": ("llama4_text", 0, {"num_experts_per_tok": 1, "no_rope_layers": [1, 0]}),
    "qwen2": ("qwen2", 0, {"tie_word_embeddings": True}),
    "qwen2_yarn": ("qwen2", 0, {"rope_parameters": YARN}),
    "qwen2_moe": ("qwen2_moe", 0, {}),
    "qwen3": ("qwen3", 0, {"tie_word_embeddings": False, "vocab_size": 95}),  # padded to 96 rows
    "qwen3_moe": ("qwen3_moe", 0, {"norm_topk_prob": True}),
    "deepseek_v3": ("deepseek_v3", 1, {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 2.5}),
    "deepseek_v32": ("deepseek_v32", 1, {}),
    "glm4_moe": ("glm4_moe", 1, {}),
    "glm4_moe_lite": ("glm4_moe_lite", 1, {"rms_norm_eps": 1e-6}),
    "uneven": ("glm4_moe", 1, {"num_hidden_layers": 3}),
}


def make(folder: Path, name: str) -> dict[str, Any]:
    """The case for megatron_programs.compare: folders and file written under `folder`."""
    family, mtp, changes = CASES[name]
    hf = write_model(folder / "hf", family, mtp, **changes)
    perturb(hf)
    hf_to_torch_dist(hf, folder / "td", Options(mtp_layers=mtp, dtype="float32", make_vocab_size_divisible_by=2))
    save_file(reference(hf, mtp), folder / "reference.safetensors")
    return {"hf": str(hf), "checkpoint": str(folder / "td" / "release"), "reference": str(folder / "reference.safetensors"), "mtp": mtp}


def perturb(hf: Path) -> None:
    """Values that transformers initialises alike (norms 1, biases 0) become random, so that one taken for another shows; MTP's are made small."""
    tensors = load_file(hf / "model.safetensors")
    generator, layers = torch.Generator().manual_seed(1), known_folder(hf).config.layers
    for name, tensor in sorted(tensors.items()):
        if tensor.dim() == 1:
            tensors[name] = (tensor + 0.2 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        elif name.startswith(f"model.layers.{layers}.") and not name.endswith(("embed_tokens.weight", "head.weight")):
            tensors[name] = tensor * 0.1
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def reference(hf: Path, mtp: int) -> dict[str, torch.Tensor]:
    """Tokens and transformers' float32 logits; for MTP the logits of an independent computation."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    found = {}
    for i, size in enumerate(TOKENS):
        tokens = torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(i))
        found |= {f"tokens.{i}": tokens, f"logits.{i}": model(tokens).logits}
        if mtp:
            found[f"mtp.{i}"] = mtp_logits(hf, model, tokens)
    return found


def mtp_logits(hf: Path, model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, S - 1, V] of the first MTP layer, as DeepSeek-V3's report writes it: the next token's embedding and this position's hidden
    state, each normed, projected to one, through a layer like the others, normed, through the output layer.
    """
    tensors = load_file(hf / "model.safetensors")
    last, beyond = f"model.layers.{model.config.num_hidden_layers - 1}.", f"model.layers.{model.config.num_hidden_layers}."
    own = {name.removeprefix(beyond): tensor.float() for name, tensor in tensors.items() if name.startswith(beyond)}
    layer = other_layer(hf, {name: tensor for name, tensor in tensors.items() if not name.startswith(beyond)} | {last + n: t for n, t in own.items() if last + n in tensors})
    trunk, eps = model.model, model.config.rms_norm_eps

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], own[f"{name}.weight"], eps)

    # The last position has no next token and is cut at the end. It is computed all the same, so that the indexer's choice among equal scores
    # is made in rows of the same length.
    following = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    merged = torch.cat([normed(trunk.embed_tokens(following), "enorm"), normed(trunk(tokens).last_hidden_state, "hnorm")], -1) @ own["eh_proj.weight"].T
    positions = torch.arange(merged.shape[1])[None].expand(len(tokens), -1)
    mask = torch.full((merged.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    out = layer(merged, attention_mask=mask, position_ids=positions, position_embeddings=trunk.rotary_emb(merged, positions))
    out = out[0] if isinstance(out, tuple) else out
    return model.lm_head(normed(out, "shared_head.norm"))[:, :-1].contiguous()


def other_layer(hf: Path, tensors: dict[str, torch.Tensor]) -> Any:
    """The last layer of transformers' model with these weights."""
    from transformers import AutoModelForCausalLM

    folder = hf.parent / "mtp"
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.to(torch.float32) for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((hf / "config.json").read_text())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().model.layers[-1]

