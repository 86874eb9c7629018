"""Prompt sets: rows of a Source, the row that a draw number stands for, and disjointness of sources.

A draw number maps to a row without any state: epoch = number // rows, and within an epoch either file order or a permutation
that is a function of (seed, epoch) alone. So the order of data is resumed from one integer, the next draw.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.config.exits import UserError
from miles.config.schema import RunConfig, Source
from miles.data import prompt_files
from miles.data.sample import Draw

Prompt = str | list[dict[str, Any]]

# Key under which a draw's metadata names its reasoning-gym entry; scoring regenerates the entry from it.
GYM_INDEX = "reasoning_gym_index"


@dataclass(frozen=True)
class Row:
    """One prompt of a source; `place` is where it stands, for messages."""

    prompt: Prompt
    label: str | None
    metadata: dict[str, Any] = field(default_factory=dict)
    place: str = ""


@dataclass
class PromptSet:
    """The prompts of one source (warm_start, data, eval) in file order."""

    name: str
    rows: list[Row]
    seed: int = 0
    shuffle: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def row_of(self, number: int) -> int:
        """Row that the number-th draw (from 0) of this source takes."""
        assert number >= 0, "draws are counted from 0"
        epoch, position = divmod(number, len(self.rows))
        return int(permutation(len(self.rows), self.seed, epoch)[position]) if self.shuffle else position

    def draw(self, number: int, draw: int | None = None) -> Draw:
        """The number-th draw of this source, under the run-wide draw number `draw` (default: the same)."""
        row = self.rows[self.row_of(number)]
        return Draw(number if draw is None else draw, row.prompt, row.label, row.metadata, self.name)

    def normalised(self) -> dict[str, Row]:
        """Normalised prompt -> the first row that has it."""
        found: dict[str, Row] = {}
        for row in self.rows:
            found.setdefault(normalise(row.prompt), row)
        return found


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: a bijection of 64-bit integers whose bits look random (Steele, Lea, Flood 2014)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@lru_cache(maxsize=8)
def permutation(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation i64 [rows] of 0..rows-1: rows sorted by a hash of (seed, epoch, row).

    Written out, since numpy does not promise the stream of Generator.permutation across versions and a resumed run must see
    the same order.
    """
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed % 2**64], np.uint64))
        key = _mix(key ^ _mix(np.array([epoch], np.uint64)))
        hashed = _mix(key ^ np.arange(rows, dtype=np.uint64))
    order = np.argsort(hashed, kind="stable")
    order.setflags(write=False)
    return order


def text_of(prompt: Prompt) -> str:
    """A prompt as plain text: itself, or the contents of its messages, one a line."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message.get("content", "")) for message in prompt)


def normalise(prompt: Prompt) -> str:
    """Case folded, runs of white space as one space, ends stripped: what disjointness is judged by."""
    return " ".join(text_of(prompt).casefold().split())


def read_source(name: str, source: Source, seed: int) -> PromptSet:
    """All rows of one section. Raises UserError (one line: section or file and line, fault, mend)."""
    rows = _gym_rows(name, source) if source.reasoning_gym else _file_rows(name, source)
    return PromptSet(name, rows, seed, source.shuffle)


def _file_rows(name: str, source: Source) -> list[Row]:
    if not source.prompt_data:
        raise UserError(f"{name}: no prompts; set {name}.prompt_data to a JSONL or Parquet file, or {name}.reasoning_gym to a data set's name")
    rows = []
    for place, raw in prompt_files.read_rows(source.prompt_data):
        prompt = _prompt(prompt_files.field(raw, source.input_key, place, f"{name}.input_key"), place, source.input_key)
        label = None
        if source.label_key is not None:
            value = prompt_files.field(raw, source.label_key, place, f"{name}.label_key")
            label = value if value is None or isinstance(value, str) else str(value)
        metadata = raw.get(source.metadata_key) or {}
        if not isinstance(metadata, dict):
            raise UserError(f"{place}: {source.metadata_key!r} must be an object, found a {type(metadata).__name__}; set {name}.metadata_key")
        rows.append(Row(prompt, label, metadata, place))
    return rows


def _prompt(value: Any, place: str, key: str) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value):
        return value
    raise UserError(f"{place}: {key!r} must be text, or a list of chat messages with role and content; found {str(value)[:60]!r}")


def gym_dataset(name: str, source: Source) -> Any:
    """The reasoning-gym data set of a section; importing the package takes a second. Raises UserError for an unknown name or configuration."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(f"{name}.reasoning_gym: reasoning-gym can't be imported ({error}); install it with pip install 'miles[train]', or take {name}.prompt_data") from error

    wanted, config = source.reasoning_gym, source.reasoning_gym_config
    assert wanted is not None
    if wanted not in DATASETS:
        near = difflib.get_close_matches(wanted, DATASETS, n=1, cutoff=0.5)
        raise UserError(f"{name}.reasoning_gym: no data set {wanted!r}; " + (f"did you mean {near[0]!r}?" if near else f"take one of reasoning-gym's {len(DATASETS)}, such as chain_sum"))
    known = [each.name for each in dataclasses.fields(DATASETS[wanted][1])]
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise UserError(f"{name}.reasoning_gym_config: {wanted} has no key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"))
    if config.get("seed") is None:
        raise UserError(f"{name}.reasoning_gym_config: no seed; without one every start of the run would make other prompts; add seed and size")
    with _gym_errors(name, wanted):
        return reasoning_gym.create_dataset(wanted, **config)


@contextmanager
def _gym_errors(name: str, wanted: str) -> Iterator[None]:
    """What the package raises over its configuration, as the user's mistake; a value may be found wrong only when a question is made."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}.reasoning_gym_config: {wanted} refuses it: {line}; mend the value") from error


def _gym_rows(name: str, source: Source) -> list[Row]:
    """Questions of a reasoning-gym data set, each normalised text once."""
    dataset = gym_dataset(name, source)
    rows, seen = [], set()
    for index in range(len(dataset)):
        with _gym_errors(name, str(source.reasoning_gym)):
            entry = dataset[index]
        key = normalise(entry["question"])
        if key in seen:
            continue
        seen.add(key)
        answer = entry["answer"]
        label = answer if answer is None or isinstance(answer, str) else str(answer)
        rows.append(Row(entry["question"], label, {GYM_INDEX: index}, f"{name}: {source.reasoning_gym}[{index}]"))
    if not rows:
        raise UserError(f"{name}: reasoning_gym {source.reasoning_gym} made no prompts; raise {name}.reasoning_gym_config.size")
    return rows


def _gym_question(name: str, source: Source) -> None:
    dataset = gym_dataset(name, source)
    with _gym_errors(name, str(source.reasoning_gym)):
        if len(dataset):
            dataset[0]


def used_sources(config: RunConfig) -> list[str]:
    """Sections whose prompts this run draws: none where its batches are recorded ones."""
    used: list[str] = []
    if config.debug.recorded:
        return used
    if config.warm_start.steps > 0:
        used.append("warm_start")
    if config.num_rollout > 0:
        used.append("data")
    if config.eval.interval is not None:
        used.append("eval")
    return used


def check_files(config: RunConfig) -> None:
    """Read the prompt files that the run draws from, and compare those that exclude each other. Raises UserError as load_prompts would.

    Of sources made on the spot only the first question is made, to see their names and values work: all of them would take seconds.
    """
    sections: dict[str, Source] = {"warm_start": config.warm_start, "data": config.data, "eval": config.eval}
    used = used_sources(config)
    needed = {*used, *(other for name in used for other in sections[name].exclude)}
    found = {name: read_source(name, section, 0) for name, section in sections.items() if name in needed and section.prompt_data}
    for name in sorted(needed):
        if sections[name].reasoning_gym and (config.cluster.executor == "local" or importlib.util.find_spec("reasoning_gym")):  # a login node may lack it
            _gym_question(name, sections[name])
    for name in used:
        if name in found and sections[name].exclude:
            others = [(other, found[other].normalised()) for other in sections[name].exclude if other in found]
            _without(found[name], others, sections[name])


def load_prompts(config: RunConfig) -> dict[str, PromptSet]:
    """The prompt sets that the run draws from, by section name, with `exclude` carried out and checked.

    A source made on the spot (reasoning-gym) drops the prompts that the named sources have; in a file, an overlap is an error
    with an example. Either way disjointness as normalised strings holds afterwards, asserted here.
    """
    sections: dict[str, Source] = {"warm_start": config.warm_start, "data": config.data, "eval": config.eval}
    seeds = {"warm_start": config.seed, "data": config.data.shuffle_seed, "eval": config.seed}
    used = used_sources(config)
    needed = {*used, *(other for name in used for other in sections[name].exclude if _is_given(sections[other]))}
    raw = {name: read_source(name, sections[name], seeds[name]) for name in sections if name in needed}
    keys = {name: raw[name].normalised() for name in raw}
    kept: dict[str, PromptSet] = {}
    for name in used:
        others = [other for other in sections[name].exclude if other in raw]
        kept[name] = _without(raw[name], [(other, keys[other]) for other in others], sections[name])
        for other in others:
            overlap = keys[other].keys() & {normalise(row.prompt) for row in kept[name].rows}
            assert not overlap, f"{name} and {other} share {len(overlap)} prompts"
    return kept


def _is_given(source: Source) -> bool:
    return bool(source.prompt_data or source.reasoning_gym)


def _without(prompts: PromptSet, others: Iterable[tuple[str, dict[str, Row]]], source: Source) -> PromptSet:
    kept = []
    others = list(others)
    for row in prompts.rows:
        key = normalise(row.prompt)
        clash = next((found[key] for _, found in others if key in found), None)
        if clash is None:
            kept.append(row)
        elif not source.reasoning_gym:
            raise UserError(f"{row.place}: this prompt occurs in {clash.place} too, which {prompts.name}.exclude forbids: {key[:80]!r}; remove one of them")
    if not kept:
        names = ", ".join(name for name, _ in others)
        raise UserError(
            f"{prompts.name}: every prompt occurs in {names} as well; raise {prompts.name}.reasoning_gym_config.size, or put the seeds "
            "farther apart than the sizes (question i is made from seed + i)"
        )
    return PromptSet(prompts.name, kept, prompts.seed, prompts.shuffle)
