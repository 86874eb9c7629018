"""Weights through the engine's socket, bucket by bucket, as safetensors bytes: no file, for the embedded engine."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence

from safetensors.torch import save

from miles.sync.contract import push
from miles.sync.engines import Engines, PauseMode
from miles.training.contract import Bucket, Trainer

BUCKET_BYTES = 64 << 20  # a bucket is held three times on its way: tensors, bytes, base64


class TensorTransport:
    """Sends buckets by /update_weights_from_tensor. Engines are paused from the first bucket to the last."""

    def __init__(
        self, urls: Sequence[str], token: str = "", mode: PauseMode = "abort", bucket_bytes: int = BUCKET_BYTES, may_leave: bool = False
    ) -> None:  # fmt: skip
        self.engines = Engines(urls, token, may_leave=may_leave)
        self.mode = mode
        self.bucket_bytes = bucket_bytes
        self._version = -1
        self._empty = True

    def push(self, trainer: Trainer, version: int) -> str:
        """Send and verify the trainer's weights; returns their checksum on every rank. Collective."""
        return push(self, trainer, version)

    def begin(self, version: int, trainer: Trainer) -> None:
        """Pause and flush."""
        self._version = version
        self._empty = self.engines.pause(self.mode)

    def send(self, buckets: Iterator[Bucket]) -> None:
        """Every bucket to every engine; the last one carries the version and empties the caches."""
        waiting = next(buckets, None)
        while waiting is not None:
            following = next(buckets, None)
            self._send(waiting, last=following is None)
            waiting = following

    def _send(self, bucket: Bucket, last: bool) -> None:
        payload = base64.b64encode(save({name: tensor.contiguous() for name, tensor in bucket})).decode()
        version = self._version if last else None
        self.engines.call(
            lambda client: client.update_from_tensor([payload], load_format="safetensors", version=version, flush_cache=last and self._empty)
        )

    def end(self) -> None:
        """Nothing is left: every bucket was loaded when it was sent."""

    def verify(self, checksum: str) -> None:
        """Compare, continue."""
        self.engines.verify(checksum, self._version)
        self.engines.resume()
