"""Two runs' log-prob mismatch side by side, on a page and on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from miles.analysis.result import WORDS, facts
from miles.analysis.state import State
from miles.analysis.tables import print_table
from miles.analysis.tools.mismatch_page import TONES, marks
from miles.analysis.tools.mismatch_plots import by_slice, by_step, divergence, probabilities, ratios
from miles.analysis.tools.mismatch_terminal import span
from miles.report.plain_page import Section, Table, Toned, Verdict, plain_page
from miles.report.scales import number
from miles.report.tiles import Tile

COMPARED = {"closer": "good", "alike": "", "further off": "bad"}
JUDGED = {True: "beyond noise", False: "within noise", None: ""}


def comparison_page(found: Mapping[str, Any], state: State, other: State) -> str:
    """found: run, against (results), comparison, differences and failures."""
    one, two = found["run"], found["against"]
    runs = [("run", one), ("against", two)]
    rows = [
        [WORDS[row["metric"]], row["value"], row["against"], row["difference"], *(row["interval"] or (None, None)), Toned(JUDGED[row["beyond_noise"]], "warn" if row["beyond_noise"] else "")]
        for row in found["differences"]
        if row["metric"] in WORDS
    ]
    numbers = Table(["", "run", "against", "difference", "95 % from", "to", ""], rows)
    sequences = [[name.replace("_", " "), value, two["sequences"].get(name)] for name, value in one["sequences"].items()]
    pictures = [ratios(state, marks(one), "ratios-run", "run"), ratios(other, marks(two), "ratios-against", "against"), probabilities(state, "probabilities-run", "run"), probabilities(other, "probabilities-against", "against")]
    causes = [[label, each["name"], 100 * each["share"]] for label, result in runs for each in result["causes"]]
    sections = [
        Section("Causes", [Table(["", "cause", "share %"], causes)] if causes else []),
        Section("All tokens", [numbers, Table(["", "run", "against"], sequences, "Sequences", folded=True)], "d = train − rollout, nats; the difference is run less against, its interval a bootstrap by sequence."),
        Section(
            "Where and since when",
            [
                *by_step(runs), *by_slice(runs, "position", "Mean |d| by position", "Tokens of the response before it."),
                *by_slice(runs, "rollout_probability", "Mean |d| by rollout probability", ""), *by_slice(runs, "lag", "Mean |d| by lag", ""),
                *by_slice(runs, "layers_routed_differently", "Mean |d| by layers routed differently", ""), *divergence(runs),
            ],
        ),
        Section("Ratios", [picture for picture in pictures if picture]),
    ]  # fmt: skip
    word, why = found["comparison"]["word"], found["comparison"]["why"]
    failed = [f"FAILED: {failure}" for failure in found["failures"]]
    badge = Verdict(word, "bad" if failed else COMPARED[word], [why, *(f"{label}: {result['verdict']}: {'; '.join(result['why'])}" for label, result in runs), *failed])
    tiles = [Tile(f"k3 of {label}", number(result["tokens"]["kl_k3"]), f"{result['verdict']}; {result['run']}", tone=TONES[result["verdict"]]) for label, result in runs]
    title = f"{one['run']} against {two['run']}"
    return plain_page(title, "log-prob mismatch of two runs", f"run: {facts(one)} · against: {facts(two)}", badge, sections, tiles, source=title)


def show_comparison(found: Mapping[str, Any], out: Console) -> None:
    """Tables on a terminal."""
    out.print(Text(f"{found['comparison']['word']}: {found['comparison']['why']}", style="bold"), soft_wrap=True)
    for label in ("run", "against"):
        each = found[label]
        out.print(Text(f"{label}: {each['run']}: {each['verdict']}; {facts(each)}"), soft_wrap=True)
    rows = [
        [WORDS[row["metric"]], row["value"], row["against"], row["difference"], span(row["interval"]), JUDGED[row["beyond_noise"]]] for row in found["differences"] if row["metric"] in WORDS
    ]
    print_table(out, "all tokens; d = train − rollout, nats", ["", "run", "against", "difference", "95 % by sequence", ""], rows)
