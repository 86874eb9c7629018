"""Responses to learn, by a user's function."""

from __future__ import annotations

from typing import Any

import pytest

from miles.config.exits import UserError
from miles.config.schema import WarmStart
from miles.data.prompts import PromptSet, Row
from miles.rollout.demonstrations import with_responses


def twice(prompt: str, label: str, metadata: dict[str, Any]) -> list[str]:
    return [label, f"{prompt} {metadata['tail']}"]


def nothing(prompt: str, label: str, metadata: dict[str, Any]) -> list[str]:
    return []


def a_text(prompt: str, label: str, metadata: dict[str, Any]) -> Any:
    return label


def raises(prompt: str, label: str, metadata: dict[str, Any]) -> list[str]:
    raise KeyError("difficulty")


def prompts() -> PromptSet:
    return PromptSet("warm_start", [Row("a", "1", {"tail": "x"}, "f.jsonl:1"), Row("b", "2", {"tail": "y"}, "f.jsonl:2")], seed=3, shuffle=True)


def options(name: str | None) -> WarmStart:
    return WarmStart(steps=1, response_path=None if name is None else f"{__name__}.{name}")


def test_each_response_is_a_row_of_its_prompt() -> None:
    found = with_responses(prompts(), options("twice"))
    assert [(row.prompt, row.label) for row in found.rows] == [("a", "1"), ("a", "a x"), ("b", "2"), ("b", "b y")]
    assert (found.name, found.seed, found.shuffle) == ("warm_start", 3, True)


def test_without_a_function_the_label_is_learnt() -> None:
    given = prompts()
    assert with_responses(given, options(None)) is given


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "returned no response for any of 2 prompts"),
        ("a_text", "must return a list of texts; for f.jsonl:1 it returned '1'"),
        ("raises", "raised KeyError for f.jsonl:1: 'difficulty'"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_faults_of_the_function_are_told_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=r"^warm_start\.response_path: ") as caught:
        with_responses(prompts(), options(name))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
