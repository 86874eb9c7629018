"""JSON Lines with a sample a line, as a run directory. docs/analysis.md has the fields; a mistake is named with its file, line and field."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from miles.config.exits import UserError
from miles.data.importers.written import Counts, Imported, RunWriter
from miles.data.sample import Flag, Sample, Status

# Our name of a field, and what other programs call it. The first that a line has counts.
NAMES = {
    "token_ids": ("token_ids", "tokens"),
    "prompt_token_ids": ("prompt_token_ids", "prompt_ids"),
    "response_token_ids": ("response_token_ids", "completion_token_ids", "completion_ids", "response_ids"),
    "prompt_length": ("prompt_length",),
    "response_length": ("response_length",),
    "rollout_logprobs": ("rollout_logprobs", "rollout_log_probs", "sampling_logprobs"),
    "train_logprobs": ("train_logprobs", "train_log_probs", "log_probs"),
    "loss_mask": ("loss_mask", "response_mask"),
    "group": ("group", "group_index", "draw"),
    "sample": ("sample",),
    "step": ("step", "rollout_id"),
    "reward": ("reward",),
    "reward_parts": ("reward_parts",),
    "status": ("status", "finish_reason"),
    "truncated": ("truncated",),
    "entropy": ("entropy",),
    "advantages": ("advantages", "advantage"),
    "used": ("used",),
    "old_logprobs": ("old_logprobs", "old_log_probs"),
    "ref_logprobs": ("ref_logprobs", "ref_log_probs"),
    "route_miss": ("route_miss",),
    "train_rank": ("train_rank",),
    "weight_version": ("weight_version",),
    "weight_versions": ("weight_versions",),
    "policy_version": ("policy_version",),
    "flags": ("flags",),
    "engine": ("engine",),
    "source": ("source", "data_source"),
    "cached_tokens": ("cached_tokens",),
    "prompt": ("prompt",),
    "response": ("response",),
    "label": ("label",),
    "metadata": ("metadata",),
}
STATUS = {**{status.name.lower(): status for status in Status}, "stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}
TRAIN = {"train_logprobs": "train_logprob", "entropy": "entropy", "advantages": "advantage", "old_logprobs": "old_logprob", "ref_logprobs": "ref_logprob"}


def import_jsonl(paths: list[Path], target: Path, groups_per_step: bool = False) -> tuple[Counts, dict[str, int]]:
    """Write the run directory `target`; returns what was written, and fields that were passed over with the number of lines that had them.

    The lines of a step stand together. groups_per_step: the numbers of groups begin anew in each step. UserError names file and line.
    """
    ignored: Counter[str] = Counter()
    numbers = Groups(groups_per_step)
    with RunWriter(target, {"from": "jsonl", "files": [str(path) for path in paths]}) as writer:
        for where, line in _lines(paths):
            try:
                row, unknown = _fields(line)
                ignored.update(unknown)
                step = _whole(row, "step", 0)
                group, member = numbers.place(step, row)
                writer.add(step, imported(row, group, member), _whole(row, "policy_version", None))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        return writer.finish(), dict(ignored)


class Groups:
    """Numbers of groups, and of samples in them."""

    def __init__(self, per_step: bool) -> None:
        self._per_step, self._kind = per_step, ""
        self._numbers: dict[Any, int] = {}
        self._members: Counter[tuple[int, int]] = Counter()

    def place(self, step: int, row: dict[str, Any]) -> tuple[int, int]:
        """(draw, sample) of a line: a group's own number where it has one, else in the order they come."""
        given = row.get("group")
        if given is not None and (isinstance(given, bool) or not isinstance(given, int | str) or (isinstance(given, int) and not 0 <= given < 1 << 62)):
            raise UserError(f"group: a number from 0 on or a text expected, {given!r:.60} found")
        kind = "without" if given is None else "by name" if isinstance(given, str) else "by number"
        if self._kind not in ("", kind):
            raise UserError(f"group: lines {kind} after lines {self._kind}; give each line a group, all numbers or all texts, or none")
        self._kind = kind
        if kind == "without":
            draw = self._numbers[len(self._numbers)] = len(self._numbers)
        elif isinstance(given, int) and not self._per_step:
            draw = given
        else:
            draw = self._numbers.setdefault((step if self._per_step else None, given), len(self._numbers))
        count = self._members[step, draw]
        self._members[step, draw] += 1
        member = _whole(row, "sample", count)
        if not 0 <= member < 1 << 16:
            raise UserError(f"sample: a number from 0 to 65535 expected, {member} found")
        return draw, member


def imported(row: dict[str, Any], draw: int, member: int) -> Imported:
    """A line's fields as a sample. UserError names the field."""
    token, prompt = _tokens(row)
    total = len(token)
    inside = np.arange(total) >= prompt
    mask = _along(row, "loss_mask", prompt, total, np.uint8, 0)
    mask = inside.astype(np.uint8) if mask is None else mask * inside
    if (mask > 1).any():
        raise UserError("loss_mask: 0 and 1 expected")
    logprob = _along(row, "rollout_logprobs", prompt, total, np.float32, math.nan)
    if logprob is None:
        raise UserError("rollout_logprobs: missing; the engine's log-prob of each response token")
    generated = inside & ((mask != 0) | (np.isfinite(logprob) & (logprob != 0)))  # a tool's output has mask 0, and 0 or nothing for a log-prob
    flags = _along(row, "flags", prompt, total, np.uint8, 0)
    if flags is None:
        flags = np.where(generated, int(Flag.GENERATED), 0).astype(np.uint8)
        starts = generated & ~np.concatenate([[False], generated[:-1]])
        flags[starts] |= np.uint8(Flag.FIRST_OF_TURN)
    generated = (flags & Flag.GENERATED) != 0
    sample = Sample(
        draw=draw, sample=member, seed=0, token_id=token, prompt_length=prompt, rollout_logprob=np.where(generated, logprob, np.nan).astype(np.float32), loss_mask=mask, flags=flags,
        status=_status(row), reward=_number(row, "reward", math.nan), reward_parts={str(name): _float(value, f"reward_parts.{name}") for name, value in _object(row, "reward_parts").items()},
        runs=_runs(row, prompt, total), turns=[], engine=_text(row, "engine") or "", source=_text(row, "source") or "data", cached_tokens=_whole(row, "cached_tokens", 0),
        metadata=_object(row, "metadata"), prompt=_text(row, "prompt"), response=_text(row, "response"), label=_text(row, "label"),
    )  # fmt: skip
    return Imported(sample, _train(row, prompt, total, mask), _whole(row, "train_rank", 0))


def _train(row: dict[str, Any], prompt: int, total: int, mask: NDArray[np.uint8]) -> dict[str, NDArray[Any]] | None:
    if row.get("train_logprobs") is None:
        given = [name for name in (*TRAIN, "used", "route_miss") if row.get(name) is not None]
        if given:
            raise UserError(f"{given[0]}: there without train_logprobs; give the trainer's log-probs as well")
        return None
    if isinstance(row.get("advantages"), int | float) and not isinstance(row["advantages"], bool):
        row = {**row, "advantages": [row["advantages"]] * (total - prompt)}
    found = {ours: _along(row, name, prompt, total, np.float32, math.nan) for name, ours in TRAIN.items()}
    used = _along(row, "used", prompt, total, np.uint8, 0)
    found["used"] = mask if used is None else used
    found["route_miss"] = _along(row, "route_miss", prompt, total, np.uint8, 0)
    return {name: values for name, values in found.items() if values is not None}


def _tokens(row: dict[str, Any]) -> tuple[NDArray[np.int32], int]:
    """All token ids, and how many of them are the prompt's."""
    if row.get("token_ids") is not None:
        token = _ids(row, "token_ids")
        if row.get("prompt_length") is not None:
            prompt = _whole(row, "prompt_length", 0)
        elif row.get("response_length") is not None:
            prompt = len(token) - _whole(row, "response_length", 0)
        elif row.get("prompt_token_ids") is not None:
            prompt = len(_ids(row, "prompt_token_ids"))
        else:
            raise UserError("prompt_length: missing beside token_ids (or response_length)")
        if not 0 <= prompt <= len(token):
            raise UserError(f"prompt_length: {prompt} of {len(token)} tokens")
        return token, prompt
    if row.get("prompt_token_ids") is None or row.get("response_token_ids") is None:
        raise UserError("token_ids: missing; give token_ids and prompt_length, or prompt_token_ids and response_token_ids")
    first, then = _ids(row, "prompt_token_ids"), _ids(row, "response_token_ids")
    return np.concatenate([first, then]), len(first)


def _ids(row: dict[str, Any], name: str) -> NDArray[np.int32]:
    values = _list(row, name)
    if not all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 for value in values):
        raise UserError(f"{name}: token ids expected, {next(value for value in values if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31)!r:.60} found")
    return np.array(values, np.int32)


def _along(row: dict[str, Any], name: str, prompt: int, total: int, dtype: type, nothing: float) -> NDArray[Any] | None:
    """Values of all tokens, or of the response's alone, as an array [T]; None where the field is missing."""
    if row.get(name) is None:
        return None
    values = _list(row, name)
    if len(values) not in (total, total - prompt):
        raise UserError(f"{name}: {len(values)} values, and there are {total - prompt} response tokens ({total} with the prompt)")
    whole = dtype is np.uint8
    for value in values:
        if value is not None and (not isinstance(value, int if whole else int | float) or (whole and not 0 <= value < 256)):
            raise UserError(f"{name}: {'whole numbers from 0 to 255' if whole else 'numbers or null'} expected, {value!r:.60} found")
    with np.errstate(over="ignore"):
        array: NDArray[Any] = np.array([nothing if value is None else value for value in values], np.float64).astype(dtype)
    return array if len(values) == total else np.concatenate([np.full(prompt, nothing, dtype), array])


def _runs(row: dict[str, Any], prompt: int, total: int) -> list[tuple[int, int]]:
    if row.get("weight_versions") is not None:
        pairs = _list(row, "weight_versions")
        good = all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, int) and each >= 0 for each in pair) and pair[0] <= total for pair in pairs)
        if not good or [pair[0] for pair in pairs] != sorted({pair[0] for pair in pairs}):
            raise UserError("weight_versions: pairs of first token (counted from the prompt's first) and version expected, ascending")
        return [(start, version) for start, version in pairs]
    version = _whole(row, "weight_version", None)
    return [] if version is None or prompt == total else [(prompt, version)]


def _status(row: dict[str, Any]) -> Status:
    given = row.get("status")
    if isinstance(given, dict):
        given = given.get("type")
    if given is None:
        return Status.TRUNCATED if row.get("truncated") else Status.COMPLETED
    if not isinstance(given, str) or given.lower() not in STATUS:
        raise UserError(f"status: one of {', '.join(STATUS)} expected, {given!r:.60} found")
    return STATUS[given.lower()]


def _lines(paths: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each line that isn't blank."""
    for path in paths:
        try:
            with _open(path) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", _parsed(line, f"{path}:{number}")
        except (FileNotFoundError, IsADirectoryError) as error:
            raise UserError(f"{path}: {(error.strerror or '').lower()}; give JSON Lines files") from None
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: {'no gzip file, or cut off' if path.suffix == '.gz' else 'not UTF-8 text'} ({error})") from None


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); one sample a line") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: an object expected, {type(value).__name__} found; one sample a line")
    return value


def _fields(line: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Known fields under our names, and names of the others."""
    found: dict[str, Any] = {}
    for ours, theirs in NAMES.items():
        for name in theirs:
            if line.get(name) is not None:
                found[ours] = line[name]
                break
    known = {name for theirs in NAMES.values() for name in theirs}
    return found, [name for name in line if name not in known]


def _list(row: dict[str, Any], name: str) -> list[Any]:
    value = row[name]
    if not isinstance(value, list):
        raise UserError(f"{name}: a list expected, {value!r:.60} found")
    return value


def _object(row: dict[str, Any], name: str) -> dict[str, Any]:
    value = row.get(name, {})
    if not isinstance(value, dict):
        raise UserError(f"{name}: an object expected, {value!r:.60} found")
    return value


def _text(row: dict[str, Any], name: str) -> str | None:
    value = row.get(name)
    if name == "prompt" and isinstance(value, list):
        return json.dumps(value)  # a chat
    if value is not None and not isinstance(value, str):
        raise UserError(f"{name}: a text expected, {value!r:.60} found")
    return value


def _whole(row: dict[str, Any], name: str, otherwise: Any) -> Any:
    value = row.get(name)
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{name}: a whole number from 0 on expected, {value!r:.60} found")
    return value


def _number(row: dict[str, Any], name: str, otherwise: float) -> float:
    return otherwise if row.get(name) is None else _float(row[name], name)


def _float(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name}: a number expected, {value!r:.60} found")
    return float(value)
