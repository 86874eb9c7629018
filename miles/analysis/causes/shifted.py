"""Log-probs that lie one token too early or too late: each sequence's fit its neighbours' better than its own."""

from __future__ import annotations

from miles.analysis.causes.cause import Case, Found


def look(case: Case) -> Found | None:
    mine = case.classes["shifted"]
    if not mine["sequences"]:
        return None
    return Found(
        "shifted by one", mine["d2"],
        [f"in {mine['sequences']:.0f} of {case.sequences} sequences the trainer's log-probs fit the token beside it, from the first token on"],
        "look at the slice of logits that the trainer takes for the response: logits of place t belong to token t + 1",
        "score one sequence in both and print both lists side by side",
    )  # fmt: skip
