"""The result of an analysis as plain values, for JSON, and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from miles.analysis import measure
from miles.analysis.causes import Cause
from miles.analysis.context import worst_tokens
from miles.analysis.state import State
from miles.analysis.tables import print_table, printable, word
from miles.analysis.verdict import Verdict

SCHEMA = "miles.mismatch/1"
MOST_ROWS = 12  # of a slice on a terminal: those with the greatest mean |d|, in their own order
WORDS = {
    "mean_diff": "mean d", "abs_diff": "mean |d|", "rms_diff": "root mean square of d", "max_abs_diff": "greatest |d|", "kl_k1": "KL(rollout‖train), k1",
    "kl_k2": "k2", "kl_k3": "k3", "reverse_kl": "KL(train‖rollout)", "ratio_mean": "mean ratio", "ratio_std": "its deviation", "chi2_token": "χ²",
    "ess": "effective sample size", "equal_share": "same bits", "slope": "slope, train on rollout", "pearson": "correlation",
    "abs_diff_p50": "median |d|", "abs_diff_p99": "99 % of |d| below", "abs_diff_p99.99": "99.99 % of |d| below",
}  # fmt: skip
COLUMNS = {"tokens": "tokens", "mean_diff": "mean d", "abs_diff": "mean |d|", "kl_k3": "k3", "ratio_mean": "mean ratio", "ess": "ESS", "equal_share": "same bits"}


def result(path: Path, state: State, tokens: dict[str, Any], verdict: Verdict, core: bool, causes: Sequence[Cause] = ()) -> dict[str, Any]:
    """Everything that was found. core: the totals alone."""
    found = {"schema": SCHEMA, "run": str(path), "verdict": verdict.word, "why": verdict.why, "advice": verdict.advice, "tokens": tokens}
    if core:
        return {**found, "read": measure.counts_of(state)}
    return {
        **found,
        "causes": [asdict(each) for each in causes],
        "intervals": measure.intervals(state),
        "sequences": measure.sequence_metrics(state),
        "first_divergence": measure.first_divergence(state),
        "slices": measure.slices(state),
        "token_ids": measure.worst_token_ids(state),
        "worst_tokens": worst_tokens(path, state),
        "read": measure.counts_of(state),
    }


def show(found: dict[str, Any], pieces: Any, out: Console) -> None:
    """Tables. pieces: token ids -> their texts."""
    out.print(Text(f"{found['verdict']}: {'; '.join(found['why'])}", style="bold"))
    out.print(Text(found["advice"]))
    read, tokens = found["read"], found["tokens"]
    skipped = [f"{count} {words}" for count, words in ((read["not_trained_on"], "batches not trained on"), (read["other_batches"], "supervised batches")) if count]
    out.print(Text(f"{read['steps']} steps, {read['sequences']} sequences, {tokens['tokens']} tokens compared" + (f"; passed over: {', '.join(skipped)}" if skipped else "")))
    odd = {"rollout NaN": "rollout_nan", "rollout −∞": "rollout_infinite", "train NaN": "train_nan", "train −∞": "train_infinite"}
    if tokens["not_comparable"]:
        kinds = ", ".join(f"{read[name]} {words}" for words, name in odd.items() if read[name])
        out.print(Text(f"{tokens['not_comparable']} tokens under the loss mask can't be compared" + (f": {kinds}" if kinds else ""), style="yellow"))
    spans = found.get("intervals", {})
    rows = [[words, tokens[name], _span(spans.get(name))] for name, words in WORDS.items() if name in tokens]
    print_table(out, "all tokens; d = train − rollout, nats", ["", "value", "95 % by sequence"], rows)
    if "sequences" not in found:
        return
    if found["verdict"] == "bitwise":
        out.print(Text("\nslices and sequences are left out: no token differs (--json has them)"))
        return
    if found["causes"]:
        rows = [[each["name"], f"{100 * each['share']:.3g} %", "; ".join(each["evidence"])] for each in found["causes"]]
        print_table(out, "causes, by their share of the sum of d²", ["", "share", "evidence"], rows)
        out.print(Text(f"to confirm: {found['causes'][0]['confirm']}"))
    print_table(out, "sequences", ["", "value"], [[name.replace("_", " "), value] for name, value in found["sequences"].items()])
    print_table(
        out, "first divergence", ["|d| above", "never", "first at (position: sequences)"],
        [[row["threshold"], row["never"], ", ".join(f"{place}: {count}" for place, count in list(row["positions"].items())[:8])] for row in found["first_divergence"]],
    )  # fmt: skip
    missing = [name.replace("_", " ") for name, rows in found["slices"].items() if rows is None]
    for name, rows in found["slices"].items():
        if rows is not None and len(rows) > 1:
            chosen = sorted(sorted(rows, key=lambda row: -row["abs_diff"])[:MOST_ROWS], key=rows.index)
            more = f" ({len(chosen)} of {len(rows)}, greatest mean |d|)" if len(rows) > len(chosen) else ""
            print_table(out, f"by {name.replace('_', ' ')}{more}", ["", *COLUMNS.values()], [[row["value"], *(row[column] for column in COLUMNS)] for row in chosen])
    if missing:
        out.print(Text(f"\nnot recorded by this run: {', '.join(missing)}"))
    if found["token_ids"] and found["token_ids"][0]["abs_diff"]:
        rows = [[row["token_id"], pieces([row["token_id"]])[0], row["tokens"], row["mean_diff"], row["abs_diff"], row["kl_k3"]] for row in found["token_ids"][:10]]
        print_table(out, "token ids, mean |d| drawn towards that of all", ["id", "text", "tokens", "mean d", "mean |d|", "k3"], rows)
    rows = []
    for each in found["worst_tokens"][:10]:
        texts = pieces(each["token_ids"])
        at = each["at"]
        around = f"{''.join(texts[max(0, at - 6) : at])}[{texts[at]}]{''.join(texts[at + 1 : at + 4])}"
        rows.append([each["abs_diff"], each["rollout_logprob"], each["train_logprob"], f"{each['step']}/{each['shard']}/{each['row']}", each["position"], printable(around)])
    if rows:
        print_table(out, "worst tokens", ["|d|", "rollout", "train", "step/shard/row", "place", "text"], rows)


def _span(span: Sequence[float] | None) -> str:
    return "" if span is None else f"{word(span[0])} to {word(span[1])}"
