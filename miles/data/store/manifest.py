"""The manifest makes shards a batch: which policy made it, which files it is, what happened to every draw, who trains on what."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from miles.data.store.epoch import Fence
from miles.data.store.files import Damaged, Sealed, read_listing, schema_kind, seal_listing, sync_folder, verify
from miles.data.store.run_dir import RunDir

log = logging.getLogger(__name__)

SCHEMA = "miles.batch/1"
NAME = "manifest.json"
Kind = Literal["rollout", "sft", "eval"]
Rows = tuple[int, int, int]  # shard index, first row, last row (exclusive)
MicroBatch = list[Rows]
Assignment = list[list[list[MicroBatch]]]  # [optimizer step][data-parallel rank][micro-batch]


class Entry(BaseModel):
    """Part of a manifest. Unknown keys are ignored, so that a newer minor version can be read."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Policy(Entry):
    """Weights that generated."""

    weight_version: int = Field(ge=0, description="number of weight updates so far")
    weight_checksum: str = Field(description="xxh3_64 over names, dtypes, shapes and bytes [hex]")


class ShardEntry(Entry):
    """One sealed file of the batch."""

    name: str = Field(description="file name, beside the manifest")
    bytes: int = Field(ge=0, description="size")
    xxh3: str = Field(description="xxh3_64 of the file [hex]")
    sequences: int = Field(ge=0, description="rows")
    tokens: int = Field(ge=0, description="tokens, prompts included")


class Dropped(Entry):
    """A draw that is in no batch, and why."""

    draw: int
    why: str


class Manifest(Entry):
    """manifest.json (miles.batch/1)."""

    schema_: str = Field(SCHEMA, alias="schema")
    run_id: str
    epoch: int = Field(ge=0, description="attempt that sealed it")
    step: int = Field(ge=0)
    kind: Kind
    policy: Policy = Field(description="weights that generated the batch")
    parent_checkpoint: str | None = Field(None, description="checkpoint that the attempt started from; null: none")
    tokenizer_hash: str = ""
    sampling: dict[str, Any] = Field(default_factory=dict, description="sampling parameters")
    engines: list[dict[str, Any]] = Field(default_factory=list, description="address, node, version, kernels of each engine")
    shards: list[ShardEntry]
    routes: list[ShardEntry] = Field(default_factory=list, description="route files; they may be gone once a newer checkpoint is complete")
    draws: list[int] = Field(default_factory=list, description="draws in the batch, ascending")
    dropped: list[Dropped] = Field(default_factory=list, description="draws consumed and not used")
    next_draw: int = Field(0, ge=0, description="first draw number not handed out to this or an earlier batch")
    assignment: Assignment = Field(default_factory=list, description="[optimizer step][rank][micro-batch] of [shard, first row, last row)")

    @property
    def sequences(self) -> int:
        return sum(shard.sequences for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


def seal_manifest(folder: Path, manifest: Manifest, fence: Fence | None = None) -> Sealed:
    """Seal manifest.json in a batch's folder: from now on the batch exists."""
    return seal_listing(folder / NAME, manifest.model_dump(mode="json", by_alias=True), fence)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest, given its path or its folder. Damaged names the file and the field; another schema is refused by name."""
    path = path / NAME if path.is_dir() else path
    content = read_listing(path)
    schema_kind(content.get("schema"), SCHEMA, path)
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None


def batch_folder(run_dir: RunDir, manifest: Manifest) -> Path:
    """Where its shards lie."""
    return run_dir.batch_of(manifest.kind, manifest.step)


def verify_batch(run_dir: RunDir, manifest: Manifest) -> None:
    """Compare size and checksum of every shard; Damaged names the first wrong one. Routes may be gone, but not damaged."""
    verify_files(batch_folder(run_dir, manifest), manifest)


def verify_files(folder: Path, manifest: Manifest) -> None:
    """verify_batch for a folder anywhere."""
    for shard in manifest.shards:
        verify(folder / shard.name, shard.bytes, shard.xxh3)
    for routes in manifest.routes:
        if (folder / routes.name).exists():
            verify(folder / routes.name, routes.bytes, routes.xxh3)


def find_batch(run_dir: RunDir, step: int, kind: Kind, weight_checksum: str | None, *, fence: Fence | None = None) -> Manifest | None:
    """The sealed batch of this step to train on again, or None when there is none (then it is generated).

    A batch counts only if it descends from the weights we have: same weight_checksum, same kind, files undamaged. Otherwise its folder is set aside as step_000012.aside.<epoch that sealed it>, never
    deleted, and a warning says so. weight_checksum None accepts any weights (replay with other ones).
    """
    folder = run_dir.batch_of(kind, step)
    if not (folder / NAME).exists():
        return None
    try:
        manifest = read_manifest(folder)
        why = _mismatch(manifest, step, kind, weight_checksum)
        if why is None:
            verify_files(folder, manifest)
            return manifest
        epoch = str(manifest.epoch)
    except Damaged as error:
        why, epoch = str(error), "damaged"
    aside = set_aside(folder, epoch, fence)
    log.warning("step %d: the recorded %s batch is not used again: %s; set aside as %s", step, kind, why, aside)
    return None


def set_aside(folder: Path, epoch: str, fence: Fence | None = None) -> Path:
    """Rename a batch's folder to <folder>.aside.<epoch>[.n]; returns the new path. With a fence: Fenced when a newer attempt exists."""
    aside, count = folder.with_name(f"{folder.name}.aside.{epoch}"), 1
    while aside.exists():
        count += 1
        aside = folder.with_name(f"{folder.name}.aside.{epoch}.{count}")
    if fence is not None:
        fence.move(folder, aside)
    else:
        folder.rename(aside)
        sync_folder(folder.parent)
    return aside


def _mismatch(manifest: Manifest, step: int, kind: Kind, weight_checksum: str | None) -> str | None:
    if manifest.step != step or manifest.kind != kind:
        return f"it is the {manifest.kind} batch of step {manifest.step}"
    if weight_checksum is not None and manifest.policy.weight_checksum != weight_checksum:
        return f"it was made by weights {manifest.policy.weight_checksum}, not by the present {weight_checksum}"
    return None
