"""Names of experts' tensors: one tensor for each expert in Hugging Face files (and SGLang), all experts in one in transformers' modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def to_hf_names(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Named tensors of a transformers module under the names of Hugging Face files, as views; others pass unchanged.

    `*.experts.gate_up_proj` [E, 2 I, H] becomes `*.experts.<e>.gate_proj.weight` and `.up_proj.weight` [I, H];
    `*.experts.down_proj` [E, H, I] becomes `*.experts.<e>.down_proj.weight` [H, I].
    """
    for name, tensor in tensors:
        if name.endswith(GATE_UP) and tensor.ndim == 3:
            prefix, half = name.removesuffix("gate_up_proj"), tensor.shape[1] // 2
            for expert in range(len(tensor)):
                yield f"{prefix}{expert}.gate_proj.weight", tensor[expert, :half]
                yield f"{prefix}{expert}.up_proj.weight", tensor[expert, half:]
        elif name.endswith(DOWN) and tensor.ndim == 3:
            prefix = name.removesuffix("down_proj")
            for expert in range(len(tensor)):
                yield f"{prefix}{expert}.down_proj.weight", tensor[expert]
        else:
            yield name, tensor
