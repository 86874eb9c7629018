"""Mean |d| by layer and expert: exact sums, mergeable in any order, and what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis import exact
from miles.analysis.expert_kernel import BY_EXPERT, WHOLE
from miles.config.exits import UserError

PRIOR = 100.0  # tokens: experts with few of them don't lead by chance
WORST = 20
CERTAIN = 5.0  # standard errors, of thousands of experts, from which on one stands out


class Experts:
    """Exact: by_expert [layers, experts, BY_EXPERT], as many as were met, and whole [WHOLE]. shapes: (layers, top_k) met; gone: route files that were deleted."""

    def __init__(self) -> None:
        self.by_expert = exact.zeros(0, 0, len(BY_EXPERT))
        self.whole = exact.zeros(len(WHOLE))
        self.shapes: set[tuple[int, int]] = set()
        self.gone: set[str] = set()

    def add(self, by_expert: NDArray[np.float64], whole: NDArray[np.float64], shape: tuple[int, int]) -> None:
        """by_expert f64 [layers, experts, len(BY_EXPERT)], whole f64 [len(WHOLE)] of some sequences."""
        self._grow(*by_expert.shape[:2])
        layers, experts = np.nonzero(by_expert[..., 0])
        flat = self.by_expert.reshape(-1, len(BY_EXPERT), exact.DIGITS)
        exact.add_rows(flat, layers * self.by_expert.shape[1] + experts, by_expert[layers, experts])
        exact.add(self.whole, whole)
        self.shapes.add(shape)

    def merge(self, other: Experts) -> None:
        """Add those of other chunks."""
        layers, experts = other.by_expert.shape[:2]
        self._grow(layers, experts)
        self.by_expert[:layers, :experts] += other.by_expert
        self.whole += other.whole
        self.shapes |= other.shapes
        self.gone |= other.gone

    def pack(self) -> list[Any]:
        """For another process."""
        return [list(self.by_expert.shape[:2]), self.by_expert.tobytes(), self.whole.tobytes(), sorted(self.shapes), sorted(self.gone)]

    @classmethod
    def unpack(cls, content: Any) -> Experts:
        """What pack() gave."""
        made = cls()
        shape, by_expert, whole, shapes, gone = content
        made.by_expert = np.frombuffer(by_expert, np.int64).reshape(*shape, len(BY_EXPERT), exact.DIGITS).copy()
        made.whole += np.frombuffer(whole, np.int64).reshape(made.whole.shape)
        made.shapes, made.gone = {tuple(each) for each in shapes}, set(gone)
        return made

    def _grow(self, layers: int, experts: int) -> None:
        held = self.by_expert
        if layers > held.shape[0] or experts > held.shape[1]:
            self.by_expert = exact.zeros(max(layers, held.shape[0]), max(experts, held.shape[1]), len(BY_EXPERT))
            self.by_expert[: held.shape[0], : held.shape[1]] = held


def by_expert(experts: Experts) -> dict[str, Any] | None:
    """Of each layer and expert, mean |d| of the tokens whose route contains it, less that of the others. None where no compared token has a route.

    `worst`: by the difference, drawn towards 0 as if PRIOR more tokens showed none; standard_error is by sequence (tokens of one are not independent).
    `difference` [layers][experts]: None where an expert has no token, or all. UserError where files have routes of several shapes.
    """
    if len(experts.shapes) > 1:
        said = ", ".join(f"{layers} layers with {each} experts a token" for layers, each in sorted(experts.shapes))
        raise UserError(f"the run's route files have {said}: files of two runs are mixed")
    whole = dict(zip(WHOLE, exact.value(experts.whole).tolist(), strict=True))
    if not whole["N"]:
        return None
    sums = dict(zip(BY_EXPERT, np.moveaxis(exact.value(experts.by_expert), -1, 0), strict=True))
    n, a = sums["n"], sums["a"]
    rest = whole["N"] - n
    with np.errstate(invalid="ignore", divide="ignore"):
        mine, others = a / n, np.maximum(whole["A"] - a, 0.0) / rest
        difference, error = mine - others, _standard_error(sums, whole, mine, others)
        drawn = difference * n / (n + PRIOR)
    known = (n > 0) & (rest > 0)
    layers, places = np.nonzero(known)
    order = np.lexsort((places, layers, -drawn[layers, places]))[:WORST]
    [(_, top_k)] = experts.shapes
    worst = [
        {
            "layer": layer, "expert": expert, "tokens": int(n[layer, expert]), "abs_diff": float(mine[layer, expert]), "others": float(others[layer, expert]),
            "difference": float(difference[layer, expert]), "standard_error": float(error[layer, expert]) if np.isfinite(error[layer, expert]) else None,
            "drawn": float(drawn[layer, expert]),
        }
        for layer, expert in zip(layers[order].tolist(), places[order].tolist(), strict=True)
    ]  # fmt: skip
    return {
        "layers": n.shape[0], "top_k": top_k, "experts": n.shape[1], "sequences": int(whole["sequences"]), "tokens": int(whole["N"]), "abs_diff": whole["A"] / whole["N"],
        "worst": worst, "difference": [[value if there else None for value, there in zip(*row, strict=True)] for row in zip(difference.tolist(), known.tolist(), strict=True)],
    }  # fmt: skip


def stands_out(row: dict[str, Any]) -> bool:
    """Whether a row of `worst` is off by more than chance."""
    return row["standard_error"] is not None and row["difference"] > CERTAIN * row["standard_error"]


def _standard_error(s: dict[str, NDArray[np.float64]], whole: dict[str, float], mine: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of mine - others, both ratios of sums over sequences: the root of Σ u² times S / (S - 1), u = p a - q n - r A + t N what a sequence moves it by."""
    count, rest = whole["sequences"], whole["N"] - s["n"]
    r = 1 / rest
    t, p, q = others * r, 1 / s["n"] + r, mine / s["n"] + others * r
    square = (
        p * p * s["aa"] + q * q * s["nn"] + r * r * whole["AA"] + t * t * whole["NN"]
        + 2 * (-p * q * s["na"] - p * r * s["aA"] + p * t * s["aN"] + q * r * s["nA"] - q * t * s["nN"] - r * t * whole["NA"])
    )  # fmt: skip
    return np.sqrt(np.maximum(square, 0.0) * (count / (count - 1)) if count > 1 else np.full_like(square, np.nan))
