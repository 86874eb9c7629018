"""megatron-core's models in rank processes (run_ranks): the largest difference of their logits to recorded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from miles.config.exits import UserError
from miles.config.schema import Parallel
from miles.models.maps.find import known_folder
from miles.training.distributed import Ranks


def compare(ranks: Ranks, jobs: list[dict[str, Any]], cases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """For each job {"layout", "cases": names}: {case: {what: largest difference}} of models loaded from torch_dist.

    A job's "not": {case: another, whose checkpoint must be refused}; "case refused" is then what was said.
    cases: {"hf", "checkpoint": folders, "reference": file of tokens and logits for each data-parallel index, "mtp": MTP layers}. Ranks
    before the last pipeline stage find nothing: {}.
    """
    from miles.training.megatron.layout import start_groups, stop_groups

    results = []
    for job in jobs:
        parallel, found = Parallel(**job["layout"]), {}
        start_groups(parallel)
        from miles.training.megatron.checkpoint import load
        from miles.training.megatron.model import build

        for name in job["cases"]:
            case = cases[name]
            known = known_folder(case["hf"])
            model = build(known, parallel, mtp_layers=case["mtp"], sequence_length=64).eval()
            load(model, known, Path(case["checkpoint"]))
            if name in job.get("not", {}):
                with pytest.raises(UserError) as caught:
                    load(model, known, Path(cases[job["not"][name]]["checkpoint"]))
                found[f"{name} refused"] = str(caught.value)
            reference, vocabulary = load_file(case["reference"]), known.config.number("vocab_size")
            found[name] = differences(model, reference, vocabulary)
            if parallel == Parallel() and not model.config.experimental_attention_variant:  # an indexer's equal scores fall otherwise in longer rows
                found[name]["packed"] = packed(model, reference, vocabulary)
        results.append(found)
    stop_groups()
    return results


@torch.no_grad()
def differences(model: Any, reference: dict[str, torch.Tensor], vocabulary: int) -> dict[str, float]:
    """Largest differences on this rank; {} on all but the last pipeline stage."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    index = parallel_state.get_data_parallel_rank()
    tokens = reference[f"tokens.{index}"]
    heads: list[torch.Tensor] = []

    def step(data: Any, model: Any) -> Any:
        return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None), lambda output, non_loss_data: output

    if hasattr(model, "mtp"):
        model.mtp.register_forward_hook(lambda module, args, hidden: heads.append(hidden))
    # two micro-batches, so that a stage receives while another sends
    outputs = get_forward_backward_func()(
        forward_step_func=step, data_iterator=None, model=[model], num_microbatches=2, seq_length=tokens.shape[1], micro_batch_size=tokens.shape[0],
        forward_only=True, collect_non_loss_data=True,
    )  # fmt: skip
    if not parallel_state.is_pipeline_last_stage():
        return {}
    assert torch.equal(*outputs)
    found = {"logits": apart(whole(outputs[0])[..., :vocabulary], reference[f"logits.{index}"])}
    if heads:
        weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        parts = heads[0].chunk(1 + model.config.mtp_num_layers)[1:]
        made = [whole(model.output_layer(part, weight=weight)[0].transpose(0, 1))[..., :vocabulary] for part in parts]
        # the last position would need a token beyond the sequence
        found["mtp"] = apart(made[0][:, :-1], reference[f"mtp.{index}"])
    return found


@torch.no_grad()
def packed(model: Any, reference: dict[str, torch.Tensor], vocabulary: int) -> float:
    """Largest difference where the sequences are packed into one."""
    from megatron.core.packed_seq_params import PackedSeqParams

    tokens = reference["tokens.0"]
    count, length = tokens.shape
    ends = torch.arange(0, count * length + 1, length, dtype=torch.int32)
    about = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=length, max_seqlen_kv=length)
    positions = torch.arange(length).repeat(count)[None]
    logits = model(tokens.view(1, -1), positions, None, packed_seq_params=about)
    return apart(logits.view(count, length, -1)[..., :vocabulary], reference["logits.0"])


def apart(mine: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference."""
    assert mine.shape == wanted.shape
    return float((mine - wanted).abs().max())


def whole(logits: torch.Tensor) -> torch.Tensor:
    """Logits of all tensor-parallel ranks."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    return gather_from_tensor_model_parallel_region(logits)
