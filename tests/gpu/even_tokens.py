"""A reward that a random model can climb in a few steps: the share of even token ids in the response."""

from __future__ import annotations

from typing import Any

from miles.data.sample import Sample


def reward(samples: list[Sample], context: Any) -> list[float]:
    """In [0, 1]; 0 for an empty response."""
    return [float((sample.token_id[sample.prompt_length :] % 2 == 0).mean()) if sample.response_length else 0.0 for sample in samples]
