"""Traces of chosen steps by torch's profiler, in Chrome's trace format: chrome://tracing and ui.perfetto.dev open them."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from miles.config.schema import Profile
from miles.data.store.epoch import Fence
from miles.data.store.files import seal


@contextmanager
def profiled(config: Profile, step: int, path: Path, fence: Fence | None = None) -> Iterator[None]:
    """Trace what happens inside and seal it as `path` (.json.gz), if this step is one of config.steps. Nothing is sealed of a step that fails."""
    if not (config.steps and config.steps[0] <= step <= config.steps[1]):
        yield
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities, record_shapes=config.record_shapes, with_stack=config.with_stack) as profiler:
        yield

    def write(temporary: Path) -> None:
        plain = temporary.with_suffix(".json")
        try:
            profiler.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(temporary, "wb", compresslevel=5) as target:
                shutil.copyfileobj(source, target)
        finally:
            plain.unlink(missing_ok=True)

    seal(path, write, fence)
