"""tools/analyze/speculative.py: tables and plots of accept lengths."""

from __future__ import annotations

from typing import Any

from miles.analysis.tools.findings import Findings
from miles.analysis.tools.plots import over_steps, placed
from miles.report.plain_page import Section, Table
from miles.report.scales import number
from miles.report.svg import Series
from miles.report.tiles import Tile

WORDS = {"verifications": "verifications", "tokens": "tokens", "accept_length": "accept length", "draft_share": "share from drafts"}
SLICES = {"step": "By step", "position": "By place in the response", "weight_version": "By weight version", "engine": "By engine", "source": "By prompt source"}


def findings(found: dict[str, Any]) -> Findings:
    """Of what miles.analysis.speculative gives."""
    total = found["total"]
    if total is None:
        return _reported(found)
    survival = found["accepted_in_a_verification"]
    tiles = [
        Tile("Accept length", number(total["accept_length"]), f"tokens of a verification, over {total['verifications']}"),
        Tile("Share from drafts", f"{100 * total['draft_share']:.1f} %", f"of {total['tokens']} tokens that verifications gave"),
        Tile("First draft accepted", f"{100 * survival[1]['share_with_as_many']:.1f} %" if len(survival) > 1 else "never", "of all verifications"),
    ]
    rows = [[row["drafts"], row["verifications"], row["share_with_as_many"]] for row in survival]
    reach = placed("reach", "Accepted drafts", "share of verifications", [Series("that many or more", [row["drafts"] for row in survival], [row["share_with_as_many"] for row in survival], "c3")], "Where the curve falls to little, more drafts cost more than they give.", "drafts", bounds=(0.0, 1.0))
    sections = [Section("Drafts of a verification", [reach, Table(["accepted", "verifications", "that many or more"], rows, "drafts accepted in a verification")])]
    for name, title in SLICES.items():
        rows = [[row[name], *(row[each] for each in WORDS)] for row in found[f"by_{name}"]]
        parts: list[Any] = [Table([name.replace("_", " "), *WORDS.values()], rows, title.lower())]
        if name in ("step", "weight_version"):
            parts = over_steps(name, f"Accept length {title.lower()}", "tokens", found[f"by_{name}"], {"accept length": "accept_length"}, x=name, caption="Tokens of a verification; a drafting model that is not trained along falls behind.") + parts
        elif name == "position":
            names = [str(row[name]) for row in found["by_position"]]
            line = Series("accept length", list(range(len(names))), [row["accept_length"] for row in found["by_position"]], "c1")
            parts.insert(0, placed(name, "Accept length along the response", "tokens", [line], "By the place of a verification's first token.", "place", names=names))
        sections.append(Section(title, parts))
    facts = f"{total['verifications']} verifications, accept length {number(total['accept_length'], 4)}; {100 * total['tokens'] / found['generated_tokens']:.1f} % of {found['generated_tokens']} generated tokens"
    return Findings("speculative decoding", found["run"], facts, sections, found, tiles)


def _reported(found: dict[str, Any]) -> Findings:
    """Counts of whole samples alone."""
    rows = found["reported_by_samples"]
    verified, tokens = sum(row["verifications"] for row in rows), sum(row["tokens"] for row in rows)
    words = {"verifications": "verifications", "tokens": "tokens", "accept_length": "accept length", "accepted_share": "drafts accepted"}
    parts: list[Any] = over_steps("step", "Accept length by step", "tokens", rows, {"accept length": "accept_length"}, caption="Tokens of a verification, as engines counted them for whole samples.")
    parts.append(Table(["step", *words.values()], [[row["step"], *(row[name] for name in words)] for row in rows], "by step"))
    parts.append("tokens carry no marks of drafts here: accept lengths by place, weight version and engine are not known")
    return Findings("speculative decoding", found["run"], f"{verified} verifications, accept length {number(tokens / verified, 4)}, as samples report", [Section("By step", parts)], found)
