"""A log-prob mismatch on a terminal: verdict, causes, the main numbers, where it is worst, what corrections would do, the worst tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from miles.analysis.result import WORDS, facts, not_recorded, passed_over
from miles.analysis.tables import print_table, word
from miles.analysis.tools.mismatch_experts import COLUMNS as EXPERT_COLUMNS
from miles.analysis.tools.mismatch_experts import SHOWN as SHOWN_EXPERTS
from miles.analysis.tools.mismatch_experts import expert_rows, experts_said
from miles.analysis.tools.mismatch_page import correction_rows
from miles.config.stdout import printable

MAIN = ("mean_diff", "abs_diff", "abs_diff_p99", "max_abs_diff", "kl_k3", "ratio_mean", "ess", "equal_share", "slope", "pearson")
SHOWN = ("no correction", "plain ratio", "TIS up to 2", "MIS sequence up to 2", "geometric 0.99 to 1.001")  # and two with bounds from the data
TELLING, MOST = 1.05, 8  # times the mean |d| of all from which on a value is called worse; rows
FEW = 100  # tokens: a slice's value with fewer is not called the worst, unless the run itself is small


def show(found: Mapping[str, Any], pieces: Any, out: Console) -> None:
    """Some forty lines at most. pieces: token ids -> their texts."""
    out.print(Text(f"{found['verdict']}: {'; '.join(found['why'])}", style="bold"), soft_wrap=True)
    out.print(Text(found["advice"]), soft_wrap=True)
    out.print(Text(facts(found)), soft_wrap=True)
    if left := passed_over(found):
        out.print(Text(left, style="yellow"), soft_wrap=True)
    if found.get("causes"):
        rows = [[each["name"], 100 * each["share"], "; ".join(each["evidence"])] for each in found["causes"]]
        print_table(out, "causes, by their share of the sum of d²", ["", "%", "evidence"], rows)
        out.print(Text(f"to confirm {found['causes'][0]['name']}: {found['causes'][0]['confirm']}"), soft_wrap=True)
    tokens, spans = found["tokens"], found.get("intervals", {})
    rows = [[WORDS[name], tokens[name], span(spans.get(name))] for name in MAIN if name in tokens]
    print_table(out, "all tokens; d = train − rollout, nats", ["", "value", "95 % by sequence"], rows)
    if "sequences" not in found:
        return
    if found["verdict"] == "bitwise":
        out.print(Text(f"\n{found['recommendation']['reason']}"), soft_wrap=True)
        return
    _worst_slices(found, out)
    chosen = found["recommendation"]["outcome"]
    settings = [row for row in found["corrections"] if row["name"] in SHOWN or row["name"].startswith(("data: IcePop", "data: geometric"))]
    rows = [[each[0], each[2], each[3] + each[4], *each[5:]] for each in correction_rows([*settings, *([chosen] if chosen else [])])]
    columns = ["setting", "clipped %", "tokens out %", "sequences out %", "effective sample size", "bias"]
    print_table(out, "what corrections would have done (data: with bounds from it)", columns, rows)
    out.print(Text(f"{'recommended because ' if chosen else ''}{found['recommendation']['reason']}"), soft_wrap=True)
    rows = []
    for each in found["worst_tokens"][:5]:
        texts, at = pieces(each["token_ids"]), each["at"]
        around = f"{''.join(texts[max(0, at - 6) : at])}[{texts[at]}]{''.join(texts[at + 1 : at + 4])}"
        rows.append([each["abs_diff"], each["rollout_logprob"] + 0.0, each["train_logprob"] + 0.0, f"{each['step']}/{each['shard']}/{each['row']}", each["position"], printable(around)])
    print_table(out, "worst tokens", ["|d|", "rollout", "train", "step/shard/row", "place", "text"], rows)
    out.print(Text("\n--html FILE has the plots, --json everything"), soft_wrap=True)


def _worst_slices(found: Mapping[str, Any], out: Console) -> None:
    """Of each slice the value with the greatest mean |d|, the most telling first; and what is not recorded."""
    whole, rows = found["tokens"], []
    for name, values in found["slices"].items():
        known = [row for row in values or () if row["tokens"] >= min(FEW, whole["tokens"] / 100)]
        if values and len(values) > 1 and known and whole["abs_diff"]:
            worst = max(known, key=lambda row: row["abs_diff"])
            rows.append([name.replace("_", " "), str(worst["value"]), worst["tokens"], worst["abs_diff"], worst["kl_k3"], worst["abs_diff"] / whole["abs_diff"]])
    telling = sorted((row for row in rows if row[-1] >= TELLING), key=lambda row: -row[-1])[:MOST]
    if telling:
        print_table(out, "where it is worst", ["by", "value", "tokens", "mean |d|", "k3", "times that of all"], telling)
    if found["experts"] and found["experts"]["worst"] and whole["abs_diff"]:
        print_table(out, experts_said(found), list(EXPERT_COLUMNS), expert_rows(found)[:SHOWN_EXPERTS])
    if missing := not_recorded(found):
        out.print(Text(f"not recorded by this run: {', '.join(missing)}", style="dim"), soft_wrap=True)


def span(interval: Sequence[float] | None) -> str:
    """An interval in words."""
    return "" if interval is None else f"{word(interval[0])} to {word(interval[1])}"
