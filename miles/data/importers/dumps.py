"""The .pt dumps of slime and miles as a run directory: rollout dumps ({rollout_id, samples}) and what each trainer rank dumped of them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.config.exits import UserError
from miles.data.importers.torch_dump import read_dump
from miles.data.importers.train_dumps import TrainSample, read_train_dumps
from miles.data.importers.written import Counts, Imported, RunWriter
from miles.data.sample import Flag, Sample, Status

STATUS = {status.name.lower(): status for status in Status}
Notes = Counter[str]


def import_dumps(rollout: list[Path], train: list[Path], target: Path, reward_key: str | None = None, samples_per_prompt: int = 1) -> tuple[Counts, dict[str, int]]:
    """Write the run directory `target`; a step is a rollout_id. Returns what was written, and what was passed over or not known, in words with counts.

    rollout alone: batches without train records. train alone: batches out of what training was given; groups are then of samples_per_prompt
    neighbours. reward_key: which of a reward's parts counts, where rewards are objects. UserError names the file.
    """
    notes: Notes = Counter()
    rollouts, ranks = _by_id(rollout, 1, notes), _by_id(train, 2, notes)
    if not rollouts and not ranks:
        raise UserError("no dumps were given: rollout dumps (…{rollout_id}.pt) or train dumps (…{rollout_id}_{rank}.pt)")
    with RunWriter(target, {"from": "dumps of slime or miles", "rollout": len(rollout), "train": len(train)}) as writer:
        for step in sorted({*rollouts, *ranks}):
            if len(rollouts.get(step, [])) > 1:
                raise UserError(f"{rollouts[step][1]}: rollout {step} again, after {rollouts[step][0]}")
            trained = read_train_dumps(step, ranks.get(step, []), notes)
            writer.end_step()
            for each in _samples(step, rollouts.get(step, []), trained, reward_key, samples_per_prompt, writer.free_draw, notes):
                writer.add(step, each)
        return writer.finish(), dict(notes)


def _by_id(paths: list[Path], numbers: int, notes: Notes) -> dict[int, list[Path]]:
    """rollout_id -> its files, by the last numbers of their names. Evaluations are passed over."""
    found: dict[int, list[Path]] = {}
    for path in sorted(paths):
        if path.name.startswith("eval_"):
            notes["evaluation dumps passed over"] += 1
            continue
        named = re.findall(r"\d+", path.stem)
        if len(named) < numbers:
            raise UserError(f"{path}: its name has no {'rollout_id' if numbers == 1 else 'rollout_id and rank'}; the dumps are called …{{rollout_id}}{'_{rank}' if numbers == 2 else ''}.pt")
        found.setdefault(int(named[-numbers]), []).append(path)
    return found


def _samples(step: int, paths: list[Path], trained: list[TrainSample], reward_key: str | None, per_prompt: int, free: int, notes: Notes) -> list[Imported]:
    """All samples of a step, with what training saw of them. free: number from which groups without one are counted."""
    if not paths:
        return [_of_train(place, each, per_prompt, free) for place, each in enumerate(trained)]
    path = paths[0]
    dump = read_dump(path)
    if dump.get("rollout_id") != step:
        raise UserError(f"{path}: holds rollout {dump.get('rollout_id')!r:.40}, and its name says {step}")
    rows = dump.get("samples")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: samples: a list of objects expected (Sample.to_dict)")
    members: Counter[Any] = Counter()
    indices: Counter[Any] = Counter()
    seen, by_index = {each.position: each for each in trained if each.position is not None}, {(each.index, each.occurrence): each for each in trained if each.index is not None}
    found, matched = [], 0
    for position, row in enumerate(rows):
        where = f"{path}: sample {position}"
        index = row.get("index")
        match = seen.get(position) if seen else by_index.get((index, indices[index]))
        indices[index] += 1
        group = row.get("group_index")
        draw = group if isinstance(group, int) else free + position // per_prompt
        if not isinstance(group, int):
            notes["samples without group_index: neighbours are taken for groups"] += 1
        found.append(_imported(where, row, draw, members[draw], match, reward_key, notes))
        members[draw] += 1
        matched += match is not None
    if matched < len(trained):
        raise UserError(f"{path}: {len(trained) - matched} samples of the train dumps of rollout {step} are not among its {len(rows)}; files of two runs are mixed")
    return found


def _imported(where: str, row: dict[str, Any], draw: int, member: int, match: TrainSample | None, reward_key: str | None, notes: Notes) -> Imported:
    token = np.asarray(row.get("tokens"), np.int64).astype(np.int32).reshape(-1) if row.get("tokens") is not None else np.zeros(0, np.int32)
    response = row.get("response_length")
    if not isinstance(response, int) or not 0 <= response <= len(token):
        raise UserError(f"{where}: response_length is {response!r:.40} of {len(token)} tokens")
    prompt = len(token) - response
    logprob = _response(where, row, "rollout_log_probs", response)
    if logprob is None and match is not None:
        logprob = match.arrays.get("rollout_log_probs")
    if logprob is None and response:
        notes["samples without rollout_log_probs"] += 1
    mask = _response(where, row, "loss_mask", response)
    if match is not None:
        if not np.array_equal(match.token, token):
            raise UserError(f"{where}: its tokens differ from those that {match.path} trained on under its number; files of two runs are mixed")
        mask = match.arrays.get("loss_mask", mask)
    mask = np.ones(response) if mask is None else mask
    if row.get("remove_sample"):
        mask = np.zeros(response)
    versions = [str(each) for each in row.get("weight_versions") or []]
    metadata = dict(row["metadata"]) if isinstance(row.get("metadata"), dict) else {}
    metadata = {str(key): value for key, value in metadata.items() if _plain(value)}
    if isinstance(info := row.get("spec_info"), dict) and info.get("spec_verify_ct"):
        metadata["spec_info"] = info
    if len(set(versions)) > 1:
        notes["samples of several weight versions: where one begins is not in the dump"] += 1
        metadata["weight_versions"] = versions
    cache = row.get("prefix_cache_info")
    texts = {name: row[name] if isinstance(row.get(name), str) else None for name in ("prompt", "response", "label")}
    sample = _sample(
        draw, member, token, prompt, logprob, mask, status=STATUS.get(str(row.get("status")), Status.PENDING), reward=_reward(where, row.get("reward"), reward_key),
        runs=[(prompt, int(versions[0]))] if len(set(versions)) == 1 and versions[0].isdecimal() and response else [], metadata=metadata,
        cached_tokens=int(cache.get("cached_tokens") or 0) if isinstance(cache, dict) else 0, routes=_routes(row, len(token), notes), **texts,
    )  # fmt: skip
    return Imported(sample, None if match is None else match.record(prompt, sample.loss_mask), 0 if match is None else match.rank)


def _of_train(place: int, each: TrainSample, per_prompt: int, free: int) -> Imported:
    """A sample out of what training was given, `place` among them."""
    prompt = len(each.token) - each.response
    sample = _sample(
        free + place // per_prompt, place % per_prompt, each.token, prompt, each.arrays.get("rollout_log_probs"), each.arrays.get("loss_mask", np.ones(each.response)),
        status=Status.TRUNCATED if each.truncated else Status.COMPLETED, reward=each.reward,
    )  # fmt: skip
    return Imported(sample, each.record(prompt, sample.loss_mask), each.rank)


def _sample(draw: int, member: int, token: NDArray[np.int32], start: int, logprob: NDArray[Any] | None, mask: NDArray[Any], **more: Any) -> Sample:
    total = len(token)
    given = np.full(total, np.nan, np.float32)
    if logprob is not None:
        given[start:] = logprob
    loss_mask = np.zeros(total, np.uint8)
    loss_mask[start:] = np.asarray(mask) != 0
    generated = (np.arange(total) >= start) & ((loss_mask != 0) | (np.isfinite(given) & (given != 0)))  # a tool's output has mask 0 and log-prob 0
    flags = np.where(generated, int(Flag.GENERATED), 0).astype(np.uint8)
    flags[generated & ~np.concatenate([[False], generated[:-1]])] |= np.uint8(Flag.FIRST_OF_TURN)
    return Sample(draw=draw, sample=member, seed=0, token_id=token, prompt_length=start, rollout_logprob=np.where(generated, given, np.nan).astype(np.float32), loss_mask=loss_mask, flags=flags, **more)


def _response(where: str, row: dict[str, Any], name: str, response: int) -> NDArray[Any] | None:
    """A list of a sample's that is as long as its response."""
    if row.get(name) is None:
        return None
    try:
        values = np.asarray(row[name], np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {name}: numbers expected") from None
    if len(values) != response:
        raise UserError(f"{where}: {name} has {len(values)} values for {response} response tokens")
    return values.astype(np.float32)


def _reward(where: str, reward: Any, key: str | None) -> float:
    if isinstance(reward, dict):
        if key is None or key not in reward:
            raise UserError(f"{where}: its reward is an object with {', '.join(map(str, reward))}; say which counts by --reward-key")
        reward = reward[key]
    if reward is None:
        return float("nan")
    try:
        return float(reward)
    except (TypeError, ValueError):
        raise UserError(f"{where}: reward: a number expected, {reward!r:.60} found") from None


def _routes(row: dict[str, Any], total: int, notes: Notes) -> NDArray[Any] | None:
    if row.get("rollout_routed_experts") is None:
        return None
    routes = np.asarray(row["rollout_routed_experts"])
    if routes.ndim != 3 or len(routes) != total - 1 or (routes.size and not 0 <= routes.min() <= routes.max() < 1 << 16):
        notes["samples whose routes don't fit their tokens: without them"] += 1
        return None
    return routes.astype(np.uint16)


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(each) for key, each in value.items())
    if isinstance(value, list):
        return all(_plain(each) for each in value)
    return value is None or isinstance(value, str | int | float | bool)
