"""One step of training by megatron-core with its distributed optimizer, and the checkpoint that megatron.training would leave of it."""

from __future__ import annotations

import argparse
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from miles.config.schema import Parallel
from miles.models.maps.find import known_folder
from miles.training.distributed import Ranks


def step_and_save(ranks: Ranks, hf: str, checkpoint: str, run: str, mtp: int) -> None:
    """Train the model of `checkpoint` for a step in bfloat16 on data-parallel ranks, and save it with its optimizer as run/iter_0000007.

    Beside it: tokens, and the trained weights' logits in float32, as logits.safetensors.
    """
    from miles.training.megatron.layout import start_groups, stop_groups

    start_groups(Parallel())
    from megatron.core import dist_checkpointing, parallel_state

    from miles.training.megatron.checkpoint import DESCRIBED, load
    from miles.training.megatron.model import build

    on_the_host()
    known = known_folder(hf)
    model = build(known, Parallel(), dtype=torch.bfloat16, mtp_layers=mtp, sequence_length=64)
    load(model, known, Path(checkpoint))
    trained, optimizer = wrapped(model)
    tokens = torch.randint(known.config.number("vocab_size"), (2, 32), generator=torch.Generator().manual_seed(ranks.rank))
    positions = torch.arange(32).expand_as(tokens)
    trained(tokens, positions, None).float().logsumexp(-1).sum().backward()
    trained.finish_grad_sync()
    optimizer.step()
    if ranks.rank == 0:
        again = build(known, Parallel(), mtp_layers=mtp, sequence_length=64).eval()
        again.load_state_dict({name: value.float() if isinstance(value, torch.Tensor) else value for name, value in model.state_dict().items()})
        with torch.no_grad():
            save_file({"tokens": tokens, "logits": again(tokens, positions, None)}, f"{run}/logits.safetensors")
    about = DESCRIBED | {"distrib_optim_sharding_type": "fully_reshardable"}
    state: dict[str, Any] = {"model": model.sharded_state_dict(metadata=about)}
    state["optimizer"] = optimizer.sharded_state_dict(state["model"], metadata=about)
    common = {"args": argparse.Namespace(lr=1e-2), "checkpoint_version": 3.0, "iteration": 7, "opt_param_scheduler": {"num_steps": 7}}
    folder = Path(run) / "iter_0000007"
    folder.mkdir(exist_ok=True)
    ranks.barrier()
    dist_checkpointing.save(state | common, str(folder))
    if ranks.rank == 0:
        (Path(run) / "latest_checkpointed_iteration.txt").write_text("7\n")
    assert parallel_state.get_data_parallel_world_size() == ranks.world_size
    stop_groups()


def wrapped(model: Any) -> tuple[Any, Any]:
    """The model under megatron-core's data parallelism, and its distributed optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    trained = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    settings = OptimizerConfig(optimizer="adam", lr=1e-2, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, clip_grad=0.0)
    optimizer = get_megatron_optimizer(settings, [trained])
    optimizer.get_grad_norm = lambda: 0.0  # it is for display without clipping, and computed on a GPU
    return trained, optimizer


def on_the_host() -> None:
    """The optimizer asks for tensors by the names that they have on a GPU, and makes flags there."""
    from megatron.core.optimizer import distrib_optimizer, optimizer

    plain = torch.Tensor.type

    def named(self: torch.Tensor, *args: Any, **more: Any) -> Any:
        found = plain(self, *args, **more)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    class HostTorch(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def tensor(data: Any, device: Any = None, **more: Any) -> torch.Tensor:
            return torch.tensor(data, device="cpu" if device == "cuda" else device, **more)

    torch.Tensor.type = named
    torch.cuda.current_stream = lambda device=None: None
    optimizer.torch = distrib_optimizer.torch = HostTorch("torch")
