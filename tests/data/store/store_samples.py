"""A sample for the store's tests, a function of its draw and index."""

from __future__ import annotations

import numpy as np

from miles.data.sample import Sample, Status


def make_sample(draw: int, sample: int, prompt_length: int = 2, response_length: int = 3, /, **more: object) -> Sample:
    prompt, length = prompt_length, prompt_length + response_length
    generator = np.random.default_rng([draw, sample])
    logprob = -generator.random(length, np.float32)
    logprob[:prompt] = np.nan
    mask = (np.arange(length) >= prompt).astype(np.uint8)
    fields = {
        "seed": 2**63 + draw,
        "token_id": generator.integers(0, 32000, length, np.int32),
        "prompt_length": prompt,
        "rollout_logprob": logprob,
        "loss_mask": mask,
        "flags": mask.copy(),
        "status": Status.COMPLETED,
        "reward": 0.5,
        "runs": [(0, 1)],
        "turns": [(0, 0), (prompt, 1)],
        "engine": "http://127.0.0.1:1",
        **more,
    }
    return Sample(draw, sample, **fields)  # type: ignore[arg-type]
