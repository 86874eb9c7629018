"""Requests to an engine in this process, and its steps."""

from __future__ import annotations

from typing import Any

from miles.engine.engine import Engine
from miles.engine.protocol import parse_generate
from miles.engine.sequence import Sequence


def submit(engine: Engine, done: list[Sequence], prompt: list[int], rid: str | None = None, **fields: Any) -> None:
    """Queues one request; keyword arguments that are no sampling parameters go to the body."""
    top = {name: fields.pop(name) for name in ("logprob_start_len", "return_routed_experts", "extra_key") if name in fields}
    body = {"input_ids": prompt, "sampling_params": {"ignore_eos": True, **fields}, "return_logprob": True, **top}
    if rid is not None:
        body["rid"] = rid
    engine.add(parse_generate(body, engine.limits)[0], done.append)


def drain(engine: Engine) -> None:
    """Steps until nothing is left."""
    while engine.scheduler.busy:
        assert engine.step()
