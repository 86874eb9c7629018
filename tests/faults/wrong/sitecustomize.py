"""An engine that does something else than it says, for real runs with a known cause: WRONG names what, with its size.

temperature:1.1 samples and reports at 1.1 times the temperature asked for; top_p:0.9 samples within it and reports log-probs renormalised over it;
head:bf16 rounds logits; stale:1 keeps engine 1 at the weights that it began with, while it reports the checksums of the new ones.
"""

import importlib.machinery
import os
import sys

CAUSE, _, SIZE = os.environ.get("WRONG", "").partition(":")


def _draw(module):
    import torch

    right = module._draw

    def wrong(logits, batch):
        if CAUSE == "temperature":
            batch.temperature = batch.temperature * float(SIZE)
        if CAUSE == "head":
            logits = logits.bfloat16().float()
        if CAUSE == "top_p":
            batch.top_p = batch.top_p * 0 + float(SIZE)
        token, logprob = right(logits, batch)
        if CAUSE == "top_p":
            falling = (logits.float() / torch.from_numpy(batch.temperature)[:, None]).softmax(-1).sort(-1, descending=True).values
            inside = falling.cumsum(-1) - falling < float(SIZE)
            logprob = logprob - (falling * inside).sum(-1).log().numpy()
        return token, logprob

    module._draw = wrong


def _stale(module):
    import torch

    class Stale(module.Weights):
        """Keeps what was loaded first beside what it was given since; serves the first, fingerprints the last."""

        kept = None
        given = None

        @torch.no_grad()
        def _replace(self, tensors, complete, where):
            super()._replace(tensors, complete, where)
            own = self._own()
            self.given = {name: tensor.clone() for name, tensor in own.items()}
            self.updates = getattr(self, "updates", 0) + 1
            if self.updates <= 3:  # some syncs are right
                self.kept = self.given
            for name, tensor in own.items():
                tensor.copy_(self.kept[name])

        @torch.no_grad()
        def checksums(self):
            if self.given is None:
                return super().checksums()
            own = self._own()
            for name, tensor in own.items():
                tensor.copy_(self.given[name])
            found = super().checksums()
            for name, tensor in own.items():
                tensor.copy_(self.kept[name])
            return found

    module.Weights = Stale


CHANGES = {"stale": ("miles.engine.weights", _stale)} if CAUSE == "stale" else {CAUSE: ("miles.engine.runner", _draw)} if CAUSE else {}


class Finder(importlib.machinery.PathFinder):
    """Changes a module once it was loaded."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        place, change = CHANGES[CAUSE]
        if name != place:
            return None
        spec = super().find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


if CHANGES and "miles.run.engine" in sys.orig_argv and (CAUSE != "stale" or os.environ.get("MILES_RANK") == SIZE):
    sys.meta_path.insert(0, Finder)
