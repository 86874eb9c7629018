"""Responses that a warm start learns, where a user function makes them from the prompts of its source."""

from __future__ import annotations

from dataclasses import replace

from miles.config.exits import UserError
from miles.config.schema import WarmStart
from miles.data.prompts import PromptSet
from miles.rollout.imports import load_function

OPTION = "warm_start.response_path"


def with_responses(prompts: PromptSet, warm_start: WarmStart) -> PromptSet:
    """The warm start's prompts with `warm_start.response_path` carried out: a row for each response that the function returns.

    The function's signature is `responses(prompt: str | list[dict], label: str | None, metadata: dict) -> list[str]`. Raises
    UserError when it raises or returns anything else, or nothing at all for any prompt.
    """
    if warm_start.response_path is None:
        return prompts
    function = load_function(warm_start.response_path, OPTION)
    rows = []
    for row in prompts.rows:
        try:
            responses = function(row.prompt, row.label, row.metadata)
        except Exception as error:
            why = " ".join(str(error).split())
            raise UserError(f"{OPTION}: {warm_start.response_path} raised {type(error).__name__} for {row.place}: {why}") from error
        if not isinstance(responses, list) or not all(isinstance(response, str) for response in responses):
            raise UserError(f"{OPTION}: {warm_start.response_path} must return a list of texts; for {row.place} it returned {str(responses)[:60]!r}")
        rows += [replace(row, label=response) for response in responses]
    if not rows:
        raise UserError(f"{OPTION}: {warm_start.response_path} returned no response for any of {len(prompts)} prompts")
    return PromptSet(prompts.name, rows, prompts.seed, prompts.shuffle)
