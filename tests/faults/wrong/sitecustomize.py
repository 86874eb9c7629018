"""An engine that does something else than it says, for real runs with a known cause: WRONG names what, with its size.

temperature:1.1 samples and reports at 1.1 times the temperature asked for; top_p:0.9 samples within it and reports log-probs renormalised over it;
head:bf16 rounds logits; stale:1 keeps engine 1 at the weights that it began with, while it reports the checksums of the new ones.
routing:0.02 sends that share of a layer's tokens to the experts beside those that were chosen, and reports these; late:2 serves, after every second update, the
weights before it for one step more, and says with each reply which weights made it (taken.generate writes that down): that one tells no lie.
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


def _weights(module):
    import torch

    class Kept(module.Weights):
        """Keeps what it serves beside what it was given last; serves the one, fingerprints the other."""

        kept = given = None
        updates = 0
        served = "default"

        @torch.no_grad()
        def _replace(self, tensors, complete, where):
            if self.given is not None:
                self._put(self.given)
            super()._replace(tensors, complete, where)
            before, self.given = self.given, {name: tensor.clone() for name, tensor in self._own().items()}
            self.updates += 1
            self.kept = self._choose(before)
            self._put(self.kept)

        @torch.no_grad()
        def _put(self, tensors):
            for name, tensor in self._own().items():
                tensor.copy_(tensors[name])

        def checksums(self):
            if self.given is None:
                return super().checksums()
            self._put(self.given)
            found = super().checksums()
            self._put(self.kept)
            return found

    class Stale(Kept):
        def _choose(self, before):
            return self.given if self.updates <= 3 else self.kept  # some syncs are right

    class Late(Kept):
        behind = None

        def _choose(self, before):
            self.behind = self.version if before is not None and self.updates % int(SIZE) == 0 else None
            return self.given if self.behind is None else before

        @property
        def served(self):
            return self.version if self.behind is None else self.behind

    module.Weights = Stale if CAUSE == "stale" else Late


def _replies(module):
    def _hand_out(self):
        finished, self._outbox[:] = self._outbox.copy(), []
        for sequence in finished:
            sequence.weight_version = self.engine.weights.served
        self.deliver(finished)

    module.EngineThread._hand_out = _hand_out


def _router(module):
    import torch

    right = module.route

    def wrong(logits, top_k, normalise):
        index, weight = right(logits, top_k, normalise)
        drawn = (logits.double().sum(-1, keepdim=True) * 1e6).frac().abs()  # by the token's own bits: every engine shuffles a prompt that they share alike
        return torch.where(drawn < float(SIZE), (index + 1) % logits.shape[-1], index), weight

    module.route = wrong


def _program(module):
    module.DecodeProgram.serves = staticmethod(lambda model, cache: False)  # the compiled decode step has a router of its own


CHANGES = {
    "": {},
    "stale": {"miles.engine.weights": _weights},
    "late": {"miles.engine.weights": _weights, "miles.engine.engine": _replies},
    "routing": {"miles.models.fused": _router, "miles.models.decode": _program},
}.get(CAUSE, {"miles.engine.runner": _draw})


class Finder(importlib.machinery.PathFinder):
    """Changes a module once it was loaded."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in CHANGES:
            return None
        spec = super().find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            CHANGES[name](module)

        spec.loader.exec_module = exec_module
        return spec


if CHANGES and "miles.run.engine" in sys.orig_argv and (CAUSE != "stale" or os.environ.get("MILES_RANK") == SIZE):
    sys.meta_path.insert(0, Finder)
