"""Files of sequences: shards, routes, train records, journals, and a batch's shards together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miles.data.inspect.page import SPREAD, Page, Table, ranges, spread
from miles.data.sample import Sample, Status
from miles.data.store.hdf5 import reading
from miles.data.store.journal import SCHEMA as JOURNAL
from miles.data.store.journal import last_good_end, read_journal
from miles.data.store.routes import open_routes
from miles.data.store.shard import Shard, open_shard
from miles.data.store.train_record import LAYERS, open_train_record

BLOCK = 1 << 22  # tokens that are read at a time
MOST = 1 << 24  # tokens that a distribution is taken of


def shard_page(path: Path) -> Page:
    """A shard: who made it, how many sequences of which fate, rewards and lengths."""
    with reading(path), open_shard(path) as shard:
        attrs = shard.attrs
        page = Page(path, "shard: sequences that one worker made", str(attrs.pop("schema")), {"bytes": path.stat().st_size, **attrs})
        summarise_shards(page, [shard])
        page.facts["token arrays"] = ", ".join(shard.names)
    return page


def summarise_shards(page: Page, shards: Sequence[Shard]) -> None:
    """Facts and distributions of all sequences of some shards, from their small arrays."""
    tables = [shard.sequences() for shard in shards]

    def column(name: str) -> np.ndarray:
        return np.concatenate([table[name] for table in tables]) if tables else np.zeros(0)

    lengths = np.concatenate([np.diff(table["offset"].astype(np.int64)) for table in tables]) if tables else np.zeros(0, np.int64)
    status = Counter(column("status").astype(int).tolist())
    sources, engines, versions = Counter[str](), Counter[str](), set[int]()
    for shard, table in zip(shards, tables, strict=True):
        sources.update({shard.sources[index]: count for index, count in Counter(table["source"].tolist()).items()})
        engines.update({shard.engines[index] or "none": count for index, count in Counter(table["engine"].tolist()).items()})
        versions |= {version for runs in shard.runs(0, len(shard)) for _, version in runs}
    page.facts |= {
        "sequences": len(lengths),
        "tokens": int(lengths.sum()),
        "trained tokens": int(column("trained_tokens").sum()),
        "draws": ranges(column("draw").astype(int).tolist()),
        "status": {Status(value).name.lower(): count for value, count in sorted(status.items())},
        "sources": dict(sources),
        "engines": dict(engines),
        "weight versions": ranges(sorted(versions)),
    }
    rows = [spread("reward", column("reward")), spread("prompt length", column("prompt_length")), spread("response length", lengths - column("prompt_length"))]
    names = sorted({name for shard in shards for name in shard.reward_names})
    for name in names:
        parts = [table["reward_parts"][:, shard.reward_names.index(name)] for shard, table in zip(shards, tables, strict=True) if name in shard.reward_names]
        rows.append(spread(f"reward part {name}", np.concatenate(parts)))
    page.tables.append(Table("sequences", SPREAD, rows))


def routes_page(path: Path) -> Page:
    """Routes: which experts, how evenly."""
    with reading(path), open_routes(path) as routes:
        attrs = routes.attrs
        layers, top_k = routes.shape
        page = Page(path, "routes: the experts that each token went to", str(attrs.pop("schema")), {"bytes": path.stat().st_size, **attrs})
        page.facts |= {"sequences": len(routes.sequence), "rows": int(routes.offset[-1]), "layers": layers, "top_k": top_k}
        counts = np.zeros(0, np.int64)
        offset, each = routes.offset.astype(np.int64), layers * top_k
        most = int(np.searchsorted(offset, MOST // each, "right")) - 1 if offset[-1] * each > MOST else len(routes.sequence)
        if most < len(routes.sequence):
            page.notes.append(f"experts are counted in the first {most} sequences")
        low = 0
        while low < most:
            high = min(max(int(np.searchsorted(offset, offset[low] + BLOCK // each, "right")) - 1, low + 1), most)
            for experts in routes.experts(int(routes.sequence[low]), int(routes.sequence[high - 1]) + 1).values():
                found = np.bincount(experts.reshape(-1), minlength=len(counts))
                found[: len(counts)] += counts
                counts = found
            low = high
        page.facts["experts used"] = int((counts > 0).sum())
        if counts.sum():
            page.tables.append(Table("tokens an expert", SPREAD, [spread("of those used", counts[counts > 0])]))
    return page


def train_page(path: Path) -> Page:
    """A train record: whose it is, and the distribution of each value over the tokens that have one."""
    with reading(path), open_train_record(path) as record:
        attrs = record.attrs
        page = Page(path, "train record: what training saw on one node", str(attrs.pop("schema")), {"bytes": path.stat().st_size, **attrs})
        table = record.sequences()
        offset = table["offset"].astype(np.int64)
        page.facts |= {
            "sequences": len(table["row"]),
            "tokens": int(offset[-1]),
            "ranks": ranges(table["rank"].astype(int).tolist()),
            "shards": ranges(table["shard"].astype(int).tolist()),
        }
        rows: list[list[Any]] = []
        last = len(table["row"]) if offset[-1] <= MOST else max(1, int(np.searchsorted(offset, MOST, "right")) - 1)
        if last < len(table["row"]):
            page.notes.append(f"distributions are of the first {last} sequences")
        for name in record.names:
            values = record.tokens(0, last, [name])[name]
            if name == "used":
                page.facts["used tokens"] = int(np.count_nonzero(values))
            else:
                rows.append([*spread(name, values)[:-1], int(np.isnan(values).sum()) if values.dtype.kind == "f" else 0])
        page.tables.append(Table("tokens", [*SPREAD[:-1], "none"], rows))
        if layers := record.layers():
            counts = [[layer, int(compared), int(differ)] for layer, (compared, differ) in enumerate(zip(*(layers[name] for name in LAYERS), strict=True)) if compared]
            page.tables.append(Table("layers with experts", ["layer", "tokens", "routed differently"], counts))
    return page


def journal_page(path: Path) -> Page:
    """A journal: groups of each job, and whether its tail is torn."""
    jobs: dict[tuple[str, int, str], list[int]] = {}
    status: Counter[str] = Counter()
    groups = samples = tokens = 0
    for context, group in read_journal(path):
        key = str(context.get("kind", "")), int(context.get("step", -1)), str(context.get("weight_checksum", ""))
        jobs.setdefault(key, []).append(group[0].draw if group else -1)
        groups, samples, tokens = groups + 1, samples + len(group), tokens + sum(len(sample.token_id) for sample in group)
        status.update(sample.status.name.lower() for sample in group)
    size, good = path.stat().st_size, last_good_end(path)
    worker, epoch, _ = path.name.rsplit(".", 2) if path.name.count(".") >= 2 else (path.stem, "", "")
    page = Page(path, "journal: finished groups as they finished", JOURNAL if groups else None, {"bytes": size, "worker": worker, "epoch": epoch})
    page.facts |= {"groups": groups, "samples": samples, "tokens": tokens, "status": dict(status)}
    page.tables.append(Table("jobs", ["kind", "step", "weight checksum", "groups", "draws"], [[*key, len(draws), ranges(draws)] for key, draws in jobs.items()]))
    if good < size:
        page.notes.append(f"the last {size - good} bytes are no complete record (its writer was killed, or is writing): the {groups} groups before them count")
    return page


# Single sequences.


def shard_rows(paths: Sequence[Path], first: int, last: int) -> Iterator[tuple[str, Sample]]:
    """(place, sample) of rows first to last of some shards, counted through."""
    start = 0
    for path in paths:
        with reading(path), open_shard(path) as shard:
            low, high = max(first - start, 0), min(last - start, len(shard))
            for row in range(low, high):
                yield f"{path.name} row {row}", shard.samples(row, row + 1)[0]
            start += len(shard)


def journal_rows(path: Path, first: int, last: int) -> Iterator[tuple[str, Sample]]:
    """(place, sample) of a journal, samples counted through."""
    at = 0
    for number, (context, group) in enumerate(read_journal(path)):
        for sample in group:
            if first <= at < last:
                yield f"{path.name} group {number} ({context.get('kind')} step {context.get('step')})", sample
            at += 1


def count_sequences(paths: Sequence[Path]) -> int:
    """Sequences of some shards."""
    total = 0
    for path in paths:
        with reading(path), open_shard(path) as shard:
            total += len(shard)
    return total


def sample_facts(sample: Sample) -> dict[str, Any]:
    """All of a sample but its tokens."""
    facts: dict[str, Any] = {
        "draw": sample.draw, "sample": sample.sample, "status": sample.status.name.lower(), "reward": sample.reward, "seed": sample.seed,
        "source": sample.source, "engine": sample.engine, "prompt tokens": sample.prompt_length, "response tokens": sample.response_length,
        "cached tokens": sample.cached_tokens, "weight versions": [version for _, version in sample.runs],
    }  # fmt: skip
    if sample.reward_parts:
        facts["reward parts"] = sample.reward_parts
    if len(sample.turns) > 2:
        facts["turns"] = [list(turn) for turn in sample.turns]
    if sample.metadata:
        facts["metadata"] = json.dumps(sample.metadata, ensure_ascii=False, default=str)
    for name in ("label", "prompt", "response"):
        if getattr(sample, name) is not None:
            facts[name] = getattr(sample, name)
    return facts


def sample_tokens(sample: Sample, pieces: Callable[[Sequence[int]], list[str]]) -> Table:
    """One row a token: place, id, text, log-prob under the engine, loss mask, flags."""
    texts = pieces(sample.token_id.tolist())
    names = ("generated", "turn", "tool", "drafted", "resampled", "cached")
    rows: list[list[Any]] = []
    for index, token in enumerate(sample.token_id.tolist()):
        logprob = float(sample.rollout_logprob[index])
        flags = [name for bit, name in enumerate(names) if int(sample.flags[index]) >> bit & 1]
        where = "prompt" if index < sample.prompt_length else "response"
        rows.append([index, where, token, texts[index], None if np.isnan(logprob) else logprob, int(sample.loss_mask[index]), " ".join(flags)])
    return Table("tokens", ["token", "part", "id", "text", "log-prob", "loss mask", "flags"], rows)


def train_rows(path: Path, first: int, last: int) -> Iterator[tuple[dict[str, Any], Table]]:
    """(facts, values a token) of rows first to last of a train record."""
    with reading(path), open_train_record(path) as record:
        table, names = record.sequences(), record.names
        for row in range(first, last):
            values = record.tokens(row, row + 1, names)
            facts = {"row": row, "shard": int(table["shard"][row]), "shard row": int(table["row"][row]), "rank": int(table["rank"][row])}
            columns = [values[name] for name in names]
            cells = [[None if column.dtype.kind == "f" and np.isnan(column[at]) else column[at].item() for column in columns] for at in range(len(columns[0]))]
            yield facts, Table("tokens", ["token", *names], [[at, *row_cells] for at, row_cells in enumerate(cells)])


def train_count(path: Path) -> int:
    """Sequences of a train record."""
    with reading(path), open_train_record(path) as record:
        return len(record.sequences()["row"])


def journal_count(path: Path) -> int:
    """Samples of a journal."""
    return sum(len(group) for _, group in read_journal(path))

