"""tools/analyze/routing.py: tables and plots of experts' load and of routes that differ."""

from __future__ import annotations

from typing import Any

from miles.analysis.tools.findings import Findings
from miles.analysis.tools.plots import over_steps
from miles.report.figures import Placed
from miles.report.plain_page import Section, Table
from miles.report.plots import heat_map
from miles.report.scales import number
from miles.report.svg import WIDTH
from miles.report.tiles import Tile

LAYER = {
    "max_over_mean": "busiest / mean", "min_over_mean": "idlest / mean", "deviation": "deviation / mean", "entropy": "entropy, 1 even", "unused": "never used",
    "busiest": "busiest expert", "siblings_differ": "siblings' prompts differ",
}  # fmt: skip
STEP = {"tokens": "tokens", "max_over_mean": "busiest / mean", "worst_max_over_mean": "worst layer", "deviation": "deviation / mean", "entropy": "entropy, 1 even"}


def findings(found: dict[str, Any]) -> Findings:
    """Of what miles.analysis.routing gives."""
    training, loaded = found["training"], "by_layer" in found
    sections, tiles, facts = [], [], []
    if loaded:
        layers = found["by_layer"]
        facts.append(f"{found['tokens']} routed tokens, {found['layers']} layers, {found['top_k']} of {found['experts']} experts")
        worst = max(layers, key=lambda row: row["max_over_mean"])
        unused = sum(row["unused"] for row in layers)
        tiles += [
            Tile("Load, busiest / mean", number(worst["max_over_mean"]), f"worst layer: {worst['layer']}; of all layers {number(sum(row['max_over_mean'] for row in layers) / len(layers))} on average"),
            Tile("Experts never used", str(unused), f"of {found['layers']} × {found['experts']}" + ("" if unused else "; those beyond the greatest number met are not known")),
        ]
        sections += _load(found)
    if training["total"] is not None:
        facts.append(f"{training['total']['tokens']} trained tokens compared")
        tiles.append(Tile("Routed differently in training", f"{100 * training['total']['differ']:.3g} %", f"of tokens, in any layer; {number(training['total']['layers_mean'])} layers on average"))
        sections.append(_training(training))
    if loaded and found["sibling_tokens"]:
        compared = [row["siblings_differ"] for row in found["by_layer"]]
        tiles.append(Tile("Siblings' prompts differ", f"{100 * sum(compared) / len(compared):.3g} %", f"mean over layers, {found['sibling_tokens']} tokens; 0 where rollout is batch-invariant"))
    notes = [] if training["total"] else ["how often training routed otherwise is not recorded: train records have no route_miss"]
    notes += [] if loaded else ["the load of experts is not recorded: no routes beside the batches"]
    notes += [f"{found['route_files_gone']} route files are named by batches, and gone: retention deletes them first"] if found["route_files_gone"] else []
    notes += ["which layers training routed otherwise is not recorded, only in how many"] if training["total"] and not training["by_layer"] else []
    sections.append(Section("Not covered", notes))
    return Findings("expert routing", found["run"], "; ".join(facts), sections, found, tiles)


def _load(found: dict[str, Any]) -> list[Section]:
    layers, steps = found["by_layer"], found["by_step"]
    mean = [sum(row) / len(row) for row in found["load"]]
    relative = [[count / each if each else None for count in row] for row, each in zip(found["load"], mean, strict=True)]
    names = [str(expert) for expert in range(found["experts"])], [str(row["layer"]) for row in layers]
    wide, narrow = (heat_map(f"load-{name}", "Load", "expert", "layer", *names, relative, "× mean", width=width) for name, width in (("wide", 2 * WIDTH), ("narrow", WIDTH)))
    parts: list[Any] = [Placed("load", "Load of each expert", "Tokens of an expert, relative to its layer's mean; an empty place was never routed to.", wide + narrow, [], wide=True)]
    parts += over_steps(
        "balance", "Load by layer", "relative to the mean", layers, {"busiest expert": "max_over_mean", "idlest expert": "min_over_mean"}, x="layer",
        caption="1 for all is an even load; expert parallelism waits for the busiest.", bounds=(0.0, None),
    )  # fmt: skip
    parts += over_steps("siblings", "Siblings' prompts routed differently", "share of tokens", layers, {"share": "siblings_differ"}, x="layer", caption="Siblings share their prompt: what differs is noise of the engine.", bounds=(0.0, None))
    by_layer = Table(["layer", *LAYER.values()], [[row["layer"], *(row[name] for name in LAYER)] for row in layers], "by layer")
    of_steps: list[Any] = over_steps("trend", "Load by step", "busiest / mean", steps, {"mean of layers": "max_over_mean", "worst layer": "worst_max_over_mean"}, bounds=(0.0, None), caption="Of one batch; of few tokens it is above 1 by chance.")
    of_steps.append(Table(["step", *STEP.values()], [[row["step"], *(row[name] for name in STEP)] for row in steps], "by step"))
    return [Section("Load", [*parts, by_layer]), Section("Load by step", of_steps)]


def _training(training: dict[str, Any]) -> Section:
    words = {"tokens": "tokens", "differ": "routed differently", "layers_mean": "layers, mean"}
    parts: list[Any] = over_steps("misses", "Routed differently in training", "share of tokens", training["steps"], {"in any layer": "differ"}, bounds=(0.0, None), caption="Tokens under the loss mask that training routed to another set of experts in at least one layer.")
    parts.append(Table(["step", *words.values()], [[row["step"], *(row[name] for name in words)] for row in training["steps"]], "training and rollout, by step"))
    if layers := training["by_layer"]:
        parts += over_steps("missed-layers", "Routed differently in training, by layer", "share of tokens", layers, {"share": "differ"}, x="layer", bounds=(0.0, None), caption="Of the tokens under the loss mask whose routes the rollout recorded; what a layer does otherwise, those after it see.")
        parts.append(Table(["layer", "tokens", "routed differently"], [[row["layer"], row["tokens"], row["differ"]] for row in layers], "training and rollout, by layer"))
    rows = [[row["layers"], row["tokens"], row["share"]] for row in training["layers_routed_differently"]]
    return Section("Training against rollout", [*parts, Table(["layers", "tokens", "share"], rows, "layers routed differently")])
