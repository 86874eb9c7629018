"""tools/analyze/rollout_stats.py: tables and plots of what was generated."""

from __future__ import annotations

from typing import Any

from miles.analysis.tools.findings import Findings
from miles.analysis.tools.plots import over_steps
from miles.report.plain_page import Section, Table
from miles.report.scales import number
from miles.report.tiles import Tile

WORDS = {
    "samples": "samples", "groups": "groups", "response_tokens": "response tokens", "response_mean": "mean response", "response_p10": "10 % are shorter than", "response_p50": "median response",
    "response_p90": "90 % are shorter than", "response_max": "longest response", "prompt_mean": "mean prompt", "truncated": "truncated", "reward_mean": "mean reward", "reward_std": "its deviation",
    "reward_min": "least reward", "reward_max": "greatest reward", "without_reward": "samples without reward", "same_reward_groups": "groups of one reward",
    "repeated": "repeated 4-grams", "looping": "end in a loop", "cached": "prompt tokens from the prefix cache", "lag_mean": "mean lag, versions",
    "lag_max": "greatest lag", "several_versions": "responses of several versions",
}  # fmt: skip
OF_STEP = ("samples", "response_mean", "response_p90", "response_max", "truncated", "reward_mean", "same_reward_groups", "repeated", "looping", "lag_mean")
OF_LABEL = ("samples", "response_mean", "truncated", "reward_mean", "same_reward_groups", "repeated", "looping", "lag_mean")


def findings(found: dict[str, Any]) -> Findings:
    """Of what miles.analysis.rollout_stats gives."""
    total, steps = found["total"], found["steps"]
    shares = {name: f"{count} {name}" for name, count in total.get("status", {}).items()}
    sections = [Section("All steps", [Table(["", "value"], [[words, total[name]] for name, words in WORDS.items() if name in total])], note=", ".join(shares.values()))]
    plots = [
        *over_steps("lengths", "Response length", "tokens", steps, {"mean": "response_mean"}, band=("response_p10", "response_p90"), caption="Mean; the band holds 80 % of the responses.", bounds=(0.0, None)),
        *over_steps("reward", "Reward", "mean reward", steps, {"reward": "reward_mean"}, caption="Mean of all samples with a reward."),
        *over_steps(
            "shares", "Truncated, looping, without signal", "share", steps, {"truncated": "truncated", "end in a loop": "looping", "groups of one reward": "same_reward_groups"},
            caption="A group whose samples all have one reward gives no gradient where rewards are compared within groups.", bounds=(0.0, None),
        ),
        *over_steps("repeated", "Repetition", "share of 4-grams", steps, {"repeated": "repeated"}, caption="Of a response's pieces of 4 tokens, those that occurred in it before; mean over responses.", bounds=(0.0, None)),
        *over_steps("lag", "Staleness", "versions", steps, {"mean lag": "lag_mean", "greatest lag": "lag_max"}, caption="Weight versions that a token's own is behind its batch's policy."),
    ]  # fmt: skip
    sections.append(Section("By step", [*plots, Table(["step", *(WORDS[name] for name in OF_STEP)], [[row["step"], *(row.get(name) for name in OF_STEP)] for row in steps], "by step")]))
    for name, title in (("source", "By prompt source"), ("engine", "By engine")):
        rows = [row for row in found[f"{name}s"] if row["samples"]]
        if len(rows) > 1:
            sections.append(Section(title, [Table([name, *(WORDS[each] for each in OF_LABEL)], [[row[name], *(row.get(each) for each in OF_LABEL)] for row in rows], title.lower())]))
    if found["dropped"]:
        rows = sorted(found["dropped"].items(), key=lambda item: (-item[1], item[0]))
        sections.append(Section("Draws that are in no batch", [Table(["why", "draws"], [list(row) for row in rows])]))
    facts = f"{len(steps)} {found['kind']} batches, {total['samples']} samples" + (f", {total['response_tokens']} response tokens" if total["samples"] else "")
    return Findings("rollout statistics", found["run"], facts, sections, found, _tiles(total))


def _tiles(total: dict[str, Any]) -> list[Tile]:
    if not total["samples"]:
        return []
    same, lag = total["same_reward_groups"], total["lag_mean"]
    return [
        Tile("Response length", number(total["response_mean"]), f"median {number(total['response_p50'])}, longest {number(total['response_max'])}", unit="tokens"),
        Tile("Truncated", f"{100 * total['truncated']:.1f} %", "stopped at the length limit"),
        Tile("Mean reward", "–" if total["reward_mean"] is None else number(total["reward_mean"]), f"{total['without_reward']} samples without" if total["without_reward"] else "of all samples"),
        Tile("Groups of one reward", "–" if same is None else f"{100 * same:.1f} %", f"of {total['groups']} groups"),
        Tile("Repetition", "–" if total["repeated"] is None else f"{100 * total['repeated']:.1f} %", f"of 4-grams; {100 * total['looping']:.1f} % of the responses end in a loop"),
        Tile("Lag", "–" if lag is None else number(lag), "mean weight versions behind" if lag is not None else "no weight versions recorded"),
    ]
