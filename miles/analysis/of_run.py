"""The mismatch verdict for a run's report: the same analysis as tools/analyze/logprob_mismatch.py, over as much as is read in moments."""

from __future__ import annotations

from pathlib import Path

from miles.analysis.source import find_steps
from miles.analysis.tables import word
from miles.config.exits import UserError
from miles.data.store.manifest import read_manifest
from miles.data.store.run_dir import RunDir
from miles.report.mismatch import Mismatch, unknown
from miles.report.plain_page import Verdict
from miles.report.scales import number

WHOLE = 1 << 22  # tokens, prompts included: a run of at most so many is analysed with slices and causes
MOST = 1 << 26  # tokens: of a greater one the newest steps that hold so many together, totals alone
TONES = {"bitwise": "good", "noise": "good", "biased": "warn", "broken": "bad"}
ROWS = {"kl_k3": "k3, nats", "abs_diff": "mean |d|", "max_abs_diff": "greatest |d|", "ratio_mean": "mean ratio", "ess": "effective sample size", "equal_share": "same bits"}


def mismatch_of_run(path: Path, whole: int = WHOLE, most: int = MOST) -> Mismatch | None:
    """The verdict, or why there is none; None where nothing was trained on. Never raises for what a run's files hold."""
    try:
        chosen = _newest(path, most)
        if chosen is None:
            return None
        first, tokens, everything = chosen
        if first is None:
            return unknown(f"the newest step alone has {number(tokens)} tokens, too many for a report; tools/analyze/logprob_mismatch.py --core reads them")
        return _judged(path, first, core=not (everything and tokens <= whole))
    except ModuleNotFoundError as error:
        return unknown(f"{error.name} is not installed here: pip install 'miles[analyze]', and make the report again")
    except FileNotFoundError as error:
        return unknown(f"{error.filename}: gone while it was read; make the report again")
    except UserError as error:
        return unknown(str(error))


def _newest(path: Path, most: int) -> tuple[int | None, int, bool] | None:
    """(first step, tokens, whether that is all) of the newest trained rollouts with at most so many tokens; first step None where one alone has more."""
    run, first, total = RunDir(path), None, 0
    for step in reversed(find_steps(path)[0]):
        manifest = read_manifest(run.batch(step))
        if manifest.kind != "rollout":
            continue
        if total + manifest.tokens > most:
            return (None, manifest.tokens, False) if first is None else (first, total, False)
        first, total = step, total + manifest.tokens
    return None if first is None else (first, total, True)


def _judged(path: Path, first: int, core: bool) -> Mismatch:
    from miles.analysis import measure
    from miles.analysis.analyze import analyze
    from miles.analysis.causes import attribute
    from miles.analysis.ranks import Alone
    from miles.analysis.verdict import judge

    state = analyze(path, Alone(), first, core=core, routes=False)
    tokens, counts = measure.token_metrics(state, core), measure.counts_of(state)
    causes = [] if core else attribute(state.evidence)
    verdict = judge(tokens, {} if core else measure.standard_errors(state), causes)
    facts = f"{number(tokens['tokens'] or 0)} tokens of {counts['steps']} step{'s' if counts['steps'] != 1 else ''}" + (f", from step {first} on, totals alone" if core else "")
    rows = [(words, word(tokens[name])) for name, words in ROWS.items()]
    found = [(each.name, f"{100 * each.share:.3g} %", "; ".join(each.evidence)) for each in causes] if verdict.word != "bitwise" else []
    return Mismatch(Verdict(verdict.word, TONES[verdict.word], list(verdict.why), verdict.advice), facts, rows, found)
