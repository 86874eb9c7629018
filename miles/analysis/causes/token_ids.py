"""The trainer read other tokens than the engine generated: another tokenization, or another prompt before an equal response."""

from __future__ import annotations

from miles.analysis.causes.cause import Case, Found


def look(case: Case, explained_elsewhere: float) -> Found | None:
    """explained_elsewhere: Σ d² of exploded sequences that lie with an engine, a rank or a node that is off altogether."""
    exploded, prompts = case.classes["exploded"], case.classes["other_prompt"]
    variance, evidence = 0.0, []
    if exploded["d2"] > 1.5 * explained_elsewhere:
        variance += exploded["d2"] - explained_elsewhere
        evidence.append(
            f"in {exploded['sequences']:.0f} of {case.sequences} sequences d explodes at some token and stays so: "
            f"{100 * exploded['far'] / max(exploded['after'], 1):.0f} % of the tokens from there on are off by more than 3 nats"
        )
        if exploded["missing_tail"]:
            evidence.append(f"{exploded['missing_tail']:.0f} of their last tokens have no log-prob of the trainer: its sequences are shorter")
    if prompts["sequences"]:
        noise = case.noise_level
        variance += max(prompts["r2"] - noise * prompts["noise"], 0.0)
        evidence.append(f"in {prompts['sequences']:.0f} of {case.sequences} sequences the first {16} tokens are off far more than the rest: another prompt stood before them")
    if not evidence:
        return None
    return Found(
        "token ids differ", variance, evidence,
        "hand the engine's token ids to the trainer; never tokenize the text again, and build the prompt once",
        "compare the ids of one sequence in both, prompt and special tokens included",
    )  # fmt: skip
