"""The slices that every token or sequence falls into: their names, how many, and what they are called in a report."""

from __future__ import annotations

POSITIONS = 36  # the first 8 tokens of a response, then by powers of two
PROBABILITIES = 20
ENTROPIES = 33  # a quarter of a nat each, up to 8; the last: not recorded
MISSES = 65  # layers routed differently; the last: 64 or more
SIGNS = ("below 0", "0", "above 0", "not recorded")

# Slices of tokens: name and count. Their tables lie one after another in this order; weight versions come last, as many as a chunk has.
TOKEN_SLICES = {
    "position": POSITIONS,
    "rollout_probability": PROBABILITIES,
    "entropy": ENTROPIES,
    "turn": 3,
    "speculative": 3,
    "layers_routed_differently": MISSES,
    "reward_and_advantage": 16,
    "used": 2,
}
BESIDE = 8  # tokens on each side of a boundary of the loss mask
# Of tokens beside such a boundary alone: what lies beyond it; each with the nearest token and those further from it.
BOUNDARY_SLICES = {
    "after_boundary": ("the prompt", "tool output", "other text", "masked tokens"),
    "before_boundary": ("the end", "tool output", "other text", "masked tokens"),
}
SLICES = (*TOKEN_SLICES, *BOUNDARY_SLICES, "weight_version", "lag", "step", "engine", "train_rank", "node", "source", "prefix_cache", "status")
BASE = {name: sum(list(TOKEN_SLICES.values())[:place]) for place, name in enumerate(TOKEN_SLICES)}
VERSIONS = sum(TOKEN_SLICES.values())


def position_label(bucket: int) -> str:
    """0, 1, ..., 7, 8-15, 16-31, ...: tokens of the response before it."""
    return str(bucket) if bucket < 8 else f"{1 << (bucket - 5)}-{(1 << (bucket - 4)) - 1}"


def label(name: str, slot: int) -> str:
    """What a slot of TOKEN_SLICES or BOUNDARY_SLICES is called."""
    if name in BOUNDARY_SLICES:
        near, far = ("first", f"next {BESIDE - 1}") if name == "after_boundary" else ("last", f"{BESIDE - 1} earlier ones")
        return f"{far if slot % 2 else near} {name.partition('_')[0]} {BOUNDARY_SLICES[name][slot // 2]}"
    if name == "position":
        return position_label(slot)
    if name == "rollout_probability":
        return f"{slot / PROBABILITIES:.2f}-{(slot + 1) / PROBABILITIES:.2f}"
    if name == "entropy":
        last = ENTROPIES - 1
        return "not recorded" if slot == last else f"{slot / 4:.2f}-{(slot + 1) / 4:.2f}" if slot < last - 1 else f"{slot / 4:.2f} or more"
    if name == "layers_routed_differently":
        return str(slot) if slot < MISSES - 1 else f"{slot} or more"
    if name == "reward_and_advantage":
        return f"reward {SIGNS[slot >> 2]}, advantage {SIGNS[slot & 3]}"
    names = {
        "turn": ("first of a turn", "next 7 of a turn", "later"),
        "speculative": ("plain", "draft accepted", "bonus or resampled"),
        "used": ("rejected by training", "trained on"),
    }
    return names[name][slot]
