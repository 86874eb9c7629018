"""What an engine process is told when it starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from miles.config.exits import UserError


@dataclass(frozen=True)
class EngineOptions:
    """One embedded engine.

    `folder` is a Hugging Face folder; `token` the bearer token that control and generate calls need (empty: open);
    `dtype` float32 or bfloat16; `threads` of torch and the kernels. The key-value cache holds at most `kv_cache_tokens` tokens, in
    rows of `context_length` tokens, the longest prompt and response together; one running request takes one row, and at most
    `max_running_requests` run. `context_length` None: kv_cache_tokens / max_running_requests, at most what the model allows.
    `chunked_prefill_size` the most prompt tokens of one model step; `random_seed` draws the seeds that requests leave out;
    `skip_tokenizer_init` serves token ids only, like SGLang's option of that name; `weight_version` is served until an update.
    """

    folder: str
    host: str = "127.0.0.1"
    port: int = 30000
    token: str = ""
    device: str = "cpu"
    dtype: str = "float32"
    batch_invariant: bool = True
    max_running_requests: int = 64
    kv_cache_tokens: int = 65536
    threads: int = 1
    context_length: int | None = None
    random_seed: int = 0
    chunked_prefill_size: int = 2048
    skip_tokenizer_init: bool = False
    weight_version: str = "default"

    def __post_init__(self) -> None:
        for name in ("max_running_requests", "kv_cache_tokens", "threads", "chunked_prefill_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype is {self.dtype!r}; choose float32 or bfloat16")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port is {self.port}; choose 0 (a free one) to 65535")


def options_from(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> EngineOptions:
    """Options from a command line. The token comes from MILES_TOKEN alone: command lines are public on a machine."""
    parser = argparse.ArgumentParser(prog="python -m miles.run.engine", description="the embedded inference engine")
    parser.add_argument("folder", help="Hugging Face folder")
    parser.add_argument("--host", default=EngineOptions.host)
    parser.add_argument("--port", type=int, default=EngineOptions.port)
    parser.add_argument("--device", default=EngineOptions.device)
    parser.add_argument("--dtype", default=EngineOptions.dtype)
    parser.add_argument("--batch-invariant", action=argparse.BooleanOptionalAction, default=EngineOptions.batch_invariant)
    parser.add_argument("--max-running-requests", type=int, default=EngineOptions.max_running_requests)
    parser.add_argument("--kv-cache-tokens", type=int, default=EngineOptions.kv_cache_tokens)
    parser.add_argument("--threads", type=int, default=int(environ.get("OMP_NUM_THREADS") or EngineOptions.threads))
    parser.add_argument("--context-length", type=int, default=EngineOptions.context_length)
    parser.add_argument("--random-seed", type=int, default=EngineOptions.random_seed)
    parser.add_argument("--chunked-prefill-size", type=int, default=EngineOptions.chunked_prefill_size)
    parser.add_argument("--skip-tokenizer-init", action="store_true")
    parser.add_argument("--weight-version", default=EngineOptions.weight_version)
    return EngineOptions(token=environ.get("MILES_TOKEN", ""), **vars(parser.parse_args(arguments)))
