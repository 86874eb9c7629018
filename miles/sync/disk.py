"""Weights by way of a folder that trainer and engines both see: a shared file system, or /dev/shm on one machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from miles.sync.contract import BUCKET_BYTES, flatten, push
from miles.sync.engines import Engines, PauseMode
from miles.training.contract import Bucket, Trainer


class DiskTransport:
    """Exports a Hugging Face folder and has the engines load it. Engines are paused only while they load.

    folder: one subfolder a version is made here; the one before is deleted once all engines hold the new one.
    mode: abort ends running requests, retract keeps them for the new weights.
    """

    bucket_bytes = BUCKET_BYTES

    def __init__(self, folder: Path, urls: Sequence[str], token: str = "", mode: PauseMode = "abort", may_leave: bool = False) -> None:
        self.folder = Path(folder)
        self.engines = Engines(urls, token, may_leave=may_leave)
        self.mode = mode
        self._version = -1
        self._trainer: Trainer | None = None

    def push(self, trainer: Trainer, version: int) -> str:
        """Send and verify the trainer's weights; returns their checksum on every rank. Collective."""
        return push(self, trainer, version)

    @property
    def _target(self) -> Path:
        return self.folder / f"version_{self._version:06d}"

    def begin(self, version: int, trainer: Trainer) -> None:
        """Make room for this version."""
        self._version, self._trainer = version, trainer
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._target, ignore_errors=True)

    def send(self, buckets: Iterator[Bucket]) -> None:
        """Write the folder; engines go on generating meanwhile."""
        assert self._trainer is not None, "begin comes first"
        self._trainer.write_hf(self._target, flatten(buckets))

    def end(self) -> None:
        """Pause, flush, load."""
        path, version = str(self._target.resolve()), self._version
        empty = self.engines.pause(self.mode)
        self.engines.call(lambda client: client.update_from_disk(path, version, flush_cache=empty))

    def verify(self, checksum: str) -> None:
        """Compare, continue, delete the version before."""
        self.engines.verify(checksum, self._version)
        self.engines.resume()
        for old in self.folder.glob("version_*"):
            if old != self._target:
                shutil.rmtree(old, ignore_errors=True)
