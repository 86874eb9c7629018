"""megatron-core 0.19.2 on a machine without a GPU: what has to be put in place, each with its reason. With a GPU nothing is touched.

Settings that a CPU needs stand in options.py (no fused kernels), modules in local.py (norms, attention).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import types
from typing import Any

import torch

_prepared = False


def prepare() -> None:
    """Make megatron-core usable here. Call it before the first import of megatron.core; calling it again changes nothing."""
    global _prepared
    if torch.cuda.is_available() or _prepared:
        return
    _prepared = True
    # Fused functions go through torch.compile, which would start a C++ compiler for each shape.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if importlib.util.find_spec("triton") is None:
        # The one module that imports triton unguarded; its kernels serve paged stashing alone, which is off.
        stash: Any = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
        stash.GLOBAL_BLOCK_SIZE, stash.paged_stash_copy_kernel, stash.paged_stash_pop_kernel = 1024, None, None
        sys.modules[stash.__name__] = stash
    # Rotary tables, routers' counters, buffers of pipeline and all-to-all are made on "the current device".
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    # Embeddings shared over pipeline stages are summed on the GPU when the model is built.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    # Checkpoints and the pipeline wait for copies that a CPU has done already.
    torch.cuda.synchronize = lambda device=None: None
    _draw_nothing()
    _count_on_the_host()
    _schedules_on_the_host()


def _draw_nothing() -> None:
    """Dropout is drawn under generators of CUDA; here it is always 0 (options.py), so nothing is drawn."""
    from megatron.core.tensor_parallel import random

    random._CUDA_RNG_STATE_TRACKER = types.SimpleNamespace(fork=lambda name=None: contextlib.nullcontext(), get_states=dict)
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def _count_on_the_host() -> None:
    """The all-to-all dispatcher copies its counts to the host on a CUDA stream, and leaves tensors alone that are there: splits must be numbers."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def splits(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        if point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                value = getattr(self, name)
                if isinstance(value, torch.Tensor):
                    setattr(self, name, value.numpy())
        return tokens_per_expert

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = splits


def _schedules_on_the_host() -> None:
    """The pipeline's schedules count tokens in a tensor with device="cuda"; they see a torch whose zeros are made here."""
    from megatron.core.pipeline_parallel import schedules

    class HostTorch(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def zeros(*size: Any, device: Any = None, **more: Any) -> torch.Tensor:
            return torch.zeros(*size, device="cpu" if device == "cuda" else device, **more)

    schedules.torch = HostTorch("torch")
