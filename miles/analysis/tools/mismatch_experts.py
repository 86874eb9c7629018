"""Mean |d| by layer and expert, on the page of a mismatch and on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.analysis.experts import stands_out
from miles.report.figures import Placed
from miles.report.plain_page import Table
from miles.report.plots import heat_map
from miles.report.svg import WIDTH

COLUMNS = ("layer", "expert", "tokens", "mean |d|", "of the others", "difference", "standard errors")
SHOWN = 3  # on a terminal


def expert_rows(found: Mapping[str, Any]) -> list[list[Any]]:
    """The worst experts, by COLUMNS."""
    return [
        [str(row["layer"]), str(row["expert"]), row["tokens"], row["abs_diff"], row["others"], row["difference"], row["difference"] / row["standard_error"] if row["standard_error"] else None]
        for row in found["experts"]["worst"]
    ]


def experts_said(found: Mapping[str, Any]) -> str:
    """How many stand out, and over how many tokens."""
    experts, tokens = found["experts"], found["tokens"]["tokens"]
    out = sum(map(stands_out, experts["worst"]))
    share = "" if experts["tokens"] == tokens else f", {100 * experts['tokens'] / tokens:.3g} % of those compared"
    most = "at least " if out == len(experts["worst"]) else ""
    said = f"{most}{out} of {experts['layers']} × {experts['experts']} experts are off by more than chance" if out else "no expert is off by more than chance"
    return f"{said}, over {experts['tokens']} tokens with recorded routes{share}"


def by_expert_parts(found: Mapping[str, Any]) -> list[Placed | Table | str]:
    """A heat map and the worst; nothing where no routes are recorded."""
    experts = found["experts"]
    if experts is None:
        return []
    mean = experts["abs_diff"]
    if not mean or not experts["worst"]:
        return []
    values = [[None if each is None else max(each, 0.0) / mean for each in row] for row in experts["difference"]]
    names = [str(expert) for expert in range(experts["experts"])], [str(layer) for layer in range(experts["layers"])]
    svg = "".join(heat_map(f"experts-{name}", "Experts", "expert", "layer", *names, values, "× mean |d|", width=width) for name, width in (("wide", 2 * WIDTH), ("narrow", WIDTH)))
    caption = f"How much further off the tokens are that rollout routed to an expert than the others, in mean |d| of all; empty where they are not. {experts_said(found)[:1].upper()}{experts_said(found)[1:]}."
    return [Placed("experts", "Experts", caption, svg, wide=True), Table(COLUMNS, expert_rows(found), "By expert: the worst", folded=True)]
