"""From evidence to causes: an ordered test, whose shares of Σ d² add up to 1; what nothing explains is noise of arithmetic."""

from __future__ import annotations

from miles.analysis.causes import copies, lag, rounding, routing, shifted, temperature, token_ids, top_p
from miles.analysis.causes.cause import Case, Cause
from miles.analysis.evidence import Evidence

NOISE = "noise"
FAULTS = ("token ids differ", "shifted by one", "temperature", "top-p or top-k", "one engine off", "one rank off", "one node off")  # to be mended, whatever their size
LAG = "policy lag"  # another policy than the one that generated the data, though one that is meant
LOUD = 0.3  # on a logit: more than 8-bit arithmetic makes
LEAST = 0.002  # of Σ d²: a smaller share is not worth a name


def attribute(evidence: Evidence) -> list[Cause]:
    """Causes, the leading one first; noise is the last, and alone where nothing is wrong. None where no token differs."""
    case = Case(evidence)
    if not case.total:
        return []
    off = copies.find(case)
    elsewhere = min(sum(each.far for each in off), case.classes["exploded"]["d2"])
    filtered = top_p.look(case)
    scaled = None if filtered and not top_p.recorded(case) else temperature.look(case)
    found = [token_ids.look(case, elsewhere), shifted.look(case), scaled, filtered]
    found += [copies.describe(each) for each in off]
    found += [lag.look(case), routing.look(case)]
    left = case.total - sum(each.variance for each in found if each)
    found.append(rounding.look(case, max(left, 0.0)))
    kept = [each for each in found if each and each.variance > LEAST * case.total]
    explained = sum(each.variance for each in kept)
    whole = max(case.total, explained)
    causes = [Cause(each.name, each.variance / whole, each.evidence, each.advice, each.confirm) for each in sorted(kept, key=lambda each: -each.variance)]
    return [*causes, _noise(case, 1 - explained / whole)]


def _noise(case: Case, share: float) -> Cause:
    level = (max(share, 0.0) * case.total / max(sum(each["noise"] for each in case.classes.values()), 1e-300)) ** 0.5
    evidence = [f"what is left is as from noise of {level:.2g} on every logit (bf16 activations: some hundredths; fp32: a millionth)"]
    if level > LOUD:
        evidence.append("arithmetic hardly makes that much: it may come from what the run doesn't record, as other routes (route_miss) or weights")
    return Cause(
        NOISE, share, evidence, "see the verdict; equal kernels and precision on both sides would take it away", "score one batch twice with the trainer, and once more with the engine"
    )  # fmt: skip


__all__ = ["FAULTS", "LAG", "NOISE", "Cause", "attribute"]
