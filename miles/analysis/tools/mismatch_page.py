"""The page of a log-prob mismatch: verdict first, then causes, numbers with intervals, plots, corrections and the worst tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from miles.analysis.recommend import overlay_text
from miles.analysis.result import COLUMNS, WORDS, facts, not_recorded, passed_over
from miles.analysis.state import State
from miles.analysis.tools.mismatch_experts import by_expert_parts
from miles.analysis.tools.mismatch_plots import by_slice, by_step, divergence, probabilities, ratios, who_and_when
from miles.config.stdout import printable
from miles.report.plain_page import Section, Table, Toned, Verdict, plain_page
from miles.report.scales import number
from miles.report.tiles import Tile

TONES = {"bitwise": "good", "noise": "good", "biased": "warn", "broken": "bad"}
MANY = 60  # rows of a slice on the page: those with the greatest mean |d|
CORRECTION_COLUMNS = ("setting", "weight of", "clipped %", "tokens masked %", "tokens dropped %", "sequences dropped %", "effective sample size", "bias")


def mismatch_page(found: Mapping[str, Any], state: State, pieces: Any) -> str:
    """found: result() with `failures`; pieces: token ids -> their texts."""
    numbers = Section("All tokens", [numbers_table(found), sequences_table(found)], "d = train − rollout, nats; intervals are a bootstrap by sequence.")
    if found["verdict"] == "bitwise":
        sections = [numbers, corrections_section(found)]
    else:
        sections = [
            causes_section(found),
            numbers,
            Section("Ratios", [figure for figure in (ratios(state, marks(found)), probabilities(state)) if figure]),
            where_section(found),
            corrections_section(found),
            Section("Worst tokens", worst_tables(found, pieces)),
        ]
    return plain_page(found["run"], "log-prob mismatch", facts(found), verdict_of(found), sections, tiles_of(found), source=found["run"])


def where_section(found: Mapping[str, Any]) -> Section:
    """Plots and tables by step, position, probability and so on."""
    runs = [("", found)]
    parts = [
        *by_step(runs),
        *by_slice(runs, "position", "Mean |d| by position", "Tokens of the response before it."),
        *by_slice(runs, "rollout_probability", "Mean |d| by rollout probability", "Noise fades towards 1; what doesn't is another cause."),
        *by_slice(runs, "lag", "Mean |d| by lag", "Weight versions between sampling and training."),
        *by_slice(runs, "layers_routed_differently", "Mean |d| by layers routed differently", "Of a mixture of experts."),
        *divergence(runs),
        *who_and_when(found),
        *by_expert_parts(found),
        *slice_tables(found),
    ]
    return Section("Where and since when", parts)


def verdict_of(found: Mapping[str, Any]) -> Verdict:
    """With what failed a limit."""
    failed = [f"FAILED: {failure}" for failure in found["failures"]]
    left = passed_over(found)
    return Verdict(found["verdict"], "bad" if failed else TONES[found["verdict"]], [*found["why"], *failed, *([left] if left else [])], found["advice"])


def tiles_of(found: Mapping[str, Any]) -> list[Tile]:
    """Six numbers."""
    tokens, spans = found["tokens"], found["intervals"]

    def tile(name: str, metric: str, digits: int = 3, tone: str = "") -> Tile:
        note = "95 %: {} to {}".format(*(number(end, digits) for end in spans[metric])) if metric in spans else ""
        return Tile(name, number(tokens[metric], digits), note, tone=tone)

    same = Tile("Tokens with the same bits", f"{100 * tokens['equal_share']:.4g}", f"{number(tokens['equal_bits'])} of {number(tokens['masked'])}", unit="%")
    return [
        tile("k3, estimate of KL(rollout‖train)", "kl_k3", tone=TONES[found["verdict"]]), tile("Mean |d|", "abs_diff"), tile("Greatest |d|", "max_abs_diff"),
        tile("Mean ratio", "ratio_mean", 5), tile("Effective sample size", "ess", 4), same,
    ]  # fmt: skip


def causes_section(found: Mapping[str, Any]) -> Section:
    """Causes and their shares, where they were looked for."""
    rows = [[each["name"], 100 * each["share"], "; ".join(each["evidence"]), each["advice"], each["confirm"]] for each in found["causes"]]
    table = Table(["cause", "share %", "evidence", "what to do", "to confirm"], rows)
    return Section("Causes", [table] if rows else [], "Shares of the sum of d².")


def numbers_table(found: Mapping[str, Any]) -> Table:
    """Metrics of all tokens with intervals."""
    tokens, spans = found["tokens"], found["intervals"]
    rows = [[words, tokens[name], *spans.get(name, (None, None))] for name, words in WORDS.items() if name in tokens]
    return Table(["", "value", "95 % from", "to"], rows)


def sequences_table(found: Mapping[str, Any]) -> Table:
    rows = [[name.replace("_", " "), value] for name, value in found["sequences"].items()]
    return Table(["", "value"], rows, "Sequences: weights e^S, with S the sum of d over one", folded=True)


def slice_tables(found: Mapping[str, Any]) -> list[Table | str]:
    """Every slice, folded; and what was not recorded."""
    tables: list[Table | str] = []
    for name, rows in found["slices"].items():
        if rows is not None and len(rows) > 1:
            chosen = sorted(sorted(rows, key=lambda row: -row["abs_diff"])[:MANY], key=rows.index)
            more = f" ({len(chosen)} of {len(rows)}, greatest mean |d|)" if len(chosen) < len(rows) else ""
            title = name.replace("_", " ")
            tables.append(Table([title, *COLUMNS.values()], [[str(row["value"]), *(row[column] for column in COLUMNS)] for row in chosen], f"By {title}{more}", folded=True))
    missing = not_recorded(found)
    return [*tables, f"Not recorded by this run: {', '.join(missing)}."] if missing else tables


def marks(found: Mapping[str, Any]) -> list[tuple[float, str]]:
    """Bounds to draw: those recommended, else the customary ones."""
    outcome = found["recommendation"]["outcome"]
    bounds = [outcome["low"], outcome["high"]] if outcome else [0.5, 2.0]
    return [(bound, f"{bound:g}") for bound in bounds if bound]


def correction_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """By CORRECTION_COLUMNS."""
    shares = ("clipped", "masked_tokens", "dropped_tokens", "dropped_sequences")
    return [[row["name"], row["level"], *(None if row[name] is None else 100 * row[name] for name in shares), row["ess"], row["bias"]] for row in rows]


def corrections_section(found: Mapping[str, Any]) -> Section:
    """What each setting would have done, and the recommended one as YAML."""
    best = found["recommendation"]
    said = f"Recommended because {best['reason']}." if best["settings"] else f"{best['reason'][:1].upper()}{best['reason'][1:]}."
    yaml = [] if not best["settings"] else [Markup("<pre><code>{}</code></pre>").format(overlay_text(best["settings"]))]
    note = (
        "What each setting would have done to these tokens. Effective sample size: (Σw)² / (N Σw²), of tokens or of sequences, with weight 0 for what is masked or dropped; "
        "bias: Σ|w − ρ| / Σρ. Small bias and a sample size near 1 are both wanted, and are traded for each other."
    )
    if found["verdict"] == "bitwise":
        return Section("Corrections", [said])
    rows = correction_rows(found["corrections"])
    if best["outcome"]:
        [[name, *rest]] = correction_rows([best["outcome"]])
        rows.append([Toned(name, "good"), *rest])
    table = Table(CORRECTION_COLUMNS, rows)
    return Section("Corrections", [said, *yaml, table], note)


def worst_tables(found: Mapping[str, Any], pieces: Any) -> list[Table]:
    """The tokens that are furthest off with their surroundings, and token ids."""
    rows = []
    for each in found["worst_tokens"]:
        texts, at = pieces(each["token_ids"]), each["at"]
        before, after = ("".join(texts[max(0, at - 10) : at]), "".join(texts[at + 1 : at + 6]))
        text = Markup("{}<mark>{}</mark>{}").format(printable(before), printable(texts[at]) or "␣", printable(after))
        probabilities_ = [math.exp(min(max(each[name], -700.0), 700.0)) for name in ("rollout_logprob", "train_logprob")]
        rows.append([text, each["abs_diff"], *probabilities_, str(each["step"]), f"{each['shard']}/{each['row']}", each["position"], each["engine"]])
    ids = [[printable(pieces([row["token_id"]])[0]), str(row["token_id"]), row["tokens"], row["mean_diff"], row["abs_diff"], row["kl_k3"]] for row in found["token_ids"]]
    tables = []
    if rows and found["worst_tokens"][0]["abs_diff"]:
        tables.append(Table(["text", "|d|", "rollout probability", "train probability", "step", "shard/row", "place", "engine"], rows))
    if ids and found["token_ids"][0]["abs_diff"]:
        tables.append(Table(["text", "token id", "tokens", "mean d", "mean |d|", "k3"], ids, "Token ids by mean |d|, drawn towards that of all", folded=True))
    return tables
