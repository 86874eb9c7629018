"""Is training on the policy that generated the data? Reads a run's batches and train records, without a GPU, and says how far the
trainer's log-probs are from the rollout's, where, and since when.

examples:
  python tools/analyze/logprob_mismatch.py runs/quickstart
  python tools/analyze/logprob_mismatch.py runs/quickstart --first 100 --json > mismatch.json
  python tools/analyze/logprob_mismatch.py runs/quickstart --at-worst noise --above kl_k3=1e-3 --below ess=0.9      # for CI
  python tools/analyze/logprob_mismatch.py runs/quickstart --html mismatch.html --recommend correction.yaml
  python tools/analyze/logprob_mismatch.py runs/new --against runs/old --above difference.kl_k3=1e-4
  mpirun -n 16 python tools/analyze/logprob_mismatch.py RUN_DIR     # or srun --mpi=pmi2: the same bits whatever the number of processes

Exit codes: 0 all limits kept; 1 one was not; 78 the input is wrong, or there is nothing to compare, which is never a pass.
"""

import json
import math
import sys
from pathlib import Path

sys.path[: not sys.flags.safe_path] = [__file__.rpartition("/tools/")[0] or "."]  # the repository

from miles.config.exits import OK, WRONG, UserError  # noqa: E402
from miles.config.stdout import put  # noqa: E402
from miles.convert.command import parser, run  # noqa: E402

FAILED = 1


def limit(text: str) -> tuple[str, float]:
    """kl_k3=1e-3"""
    name, equals, value = text.partition("=")
    if not equals or math.isnan(float(value)):
        raise ValueError(text)
    return name, float(value)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    options.add_argument("--first", type=int, metavar="STEP", help="first step (default: the first there is)")
    options.add_argument("--last", type=int, metavar="STEP", help="last step, itself included")
    options.add_argument("--at-worst", choices=["bitwise", "noise", "biased"], default="biased", help="verdict that still passes (default: biased)")
    options.add_argument("--above", type=limit, action="append", default=[], metavar="METRIC=VALUE", help="fail above it: a name of `tokens` in --json, or sequence.NAME")
    options.add_argument("--below", type=limit, action="append", default=[], metavar="METRIC=VALUE", help="fail below it")
    options.add_argument("--against", type=Path, metavar="RUN_DIR", help="compare with another run; limits may name difference.METRIC, and hold for the first")
    options.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots, self-contained; replaces no file but such a page")
    options.add_argument("--recommend", type=Path, metavar="FILE", help="write a correction with bounds from the data as YAML that a recipe can include, where one is of use")
    options.add_argument("--core", action="store_true", help="totals alone: as fast as the files can be read")
    options.add_argument("--renamed", action="store_true", help="the run's folder was renamed between steps")
    given = options.parse_args()

    try:
        from miles.analysis.ranks import launched
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'miles[analyze]'") from None

    ranks = launched()
    try:
        return report(given, ranks)
    except UserError:
        if ranks.rank:
            return WRONG  # rank 0 says it
        raise


def report(given, ranks) -> int:
    """Analyse on all ranks; tell on rank 0."""
    from miles.analysis.analyze import analyze
    from miles.analysis.compare import SCHEMA, differences, verdict
    from miles.analysis.recommend import Recommendation, refuse_to_replace, write_overlay
    from miles.analysis.tables import Terminal
    from miles.analysis.tools.mismatch_comparison import comparison_page, show_comparison
    from miles.analysis.tools.mismatch_page import mismatch_page
    from miles.analysis.tools.mismatch_terminal import show
    from miles.analysis.verdict import ORDER, exceeded
    from miles.report.plain_page import refuse_other_files, write_page

    if given.core and (wanted := [name for name in ("html", "recommend", "against") if getattr(given, name)]):
        raise UserError(f"--{wanted[0]} needs more than the totals: leave out --core")
    if given.html:
        refuse_other_files(given.html)
    if given.recommend:
        refuse_to_replace(given.recommend)
    runs = [path for path in (given.run_dir, given.against) if path]
    states = [analyze(path, ranks, given.first, given.last, given.core, given.renamed) for path in runs]  # all of them before a rank looks at any
    if ranks.rank:
        return OK
    state, found, rows = states[0], found_in(given, given.run_dir, states[0]), []
    if given.against:
        other, other_state = found_in(given, given.against, states[1]), states[1]
        rows = differences(state, found["tokens"], other_state, other["tokens"])
    failures = exceeded(found["tokens"], found.get("sequences", {}), given.above, given.below, {row["metric"]: row["difference"] for row in rows})
    if ORDER.index(found["verdict"]) > ORDER.index(given.at_worst):
        failures.insert(0, f"the verdict is {found['verdict']}, and at worst {given.at_worst} passes")
    if given.against:
        word, why = verdict(rows)
        told = {"schema": SCHEMA, "run": found, "against": other, "comparison": {"word": word, "why": why}, "differences": rows, "failures": failures}
    else:
        told = {**found, "failures": failures}
    if given.html:
        pieces = texts_of(given.run_dir)
        write_page(comparison_page(told, state, other_state) if given.against else mismatch_page(told, state, pieces), given.html)
    said = []
    if given.recommend:
        recommendation = Recommendation(**found["recommendation"])
        if recommendation.settings:
            write_overlay(recommendation, given.recommend, given.run_dir, found["tokens"])
            said.append(f"setting: {given.recommend}: name it after the recipe's own files")
        else:
            said.append(f"{given.recommend} is not written: {recommendation.reason}")
    if given.html:
        said.append(f"page: {given.html}")
    if given.json:
        put(json.dumps(told, indent=1, allow_nan=False))
    else:
        out = Terminal()
        if given.against:
            show_comparison(told, out)
        else:
            show(told, texts_of(given.run_dir), out)
        for failure in failures:
            put(f"FAILED: {failure}")
    for line in said:
        print(line, file=sys.stderr) if given.json else put(line)
    return FAILED if failures else OK


def found_in(given, path: Path, state):
    """The result of one run."""
    from miles.analysis import measure
    from miles.analysis.causes import attribute
    from miles.analysis.recommend import recommend
    from miles.analysis.result import result
    from miles.analysis.verdict import judge

    tokens = measure.token_metrics(state, given.core)
    if not measure.counts_of(state)["sequences"]:
        raise UserError(f"{path}: nothing to compare: no step that was trained on{' lies between those bounds' if (given.first, given.last) != (None, None) else ''}")
    if given.core:
        return result(path, state, tokens, judge(tokens, {}), None)
    causes = attribute(state.evidence)
    verdict = judge(tokens, measure.standard_errors(state), causes)
    return result(path, state, tokens, verdict, recommend(state, tokens, verdict), causes)


def texts_of(run_dir: Path):
    """Token ids -> their texts, or the ids where the run has no tokenizer."""
    from miles.data.store.run_dir import RunDir
    from miles.report.records import read_run
    from miles.report.token_text import TokenText, load_token_text

    whole = RunDir(run_dir).run_yaml.is_file()
    return (load_token_text(read_run(run_dir)) if whole else TokenText(None)).pieces


if __name__ == "__main__":
    run(main)
