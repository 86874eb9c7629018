"""Is training on the policy that generated the data? Reads a run's batches and train records, without a GPU, and says how far the
trainer's log-probs are from the rollout's, where, and since when.

examples:
  python tools/analyze/logprob_mismatch.py runs/quickstart
  python tools/analyze/logprob_mismatch.py runs/quickstart --first 100 --json > mismatch.json
  python tools/analyze/logprob_mismatch.py runs/quickstart --at-worst noise --above kl_k3=1e-3 --below ess=0.9      # for CI
  mpirun -n 16 python tools/analyze/logprob_mismatch.py RUN_DIR     # or srun --mpi=pmi2: the same bits whatever the number of processes

Exit codes: 0 all limits kept; 1 one was not; 78 the input is wrong, or there is nothing to compare, which is never a pass.
"""

import json
import sys
from pathlib import Path

sys.path[: not sys.flags.safe_path] = [__file__.rpartition("/tools/")[0] or "."]  # the repository

from miles.config.exits import OK, WRONG, UserError  # noqa: E402
from miles.convert.command import parser, run  # noqa: E402

FAILED = 1


def limit(text: str) -> tuple[str, float]:
    """kl_k3=1e-3"""
    name, equals, value = text.partition("=")
    if not equals:
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
    """Analyse on all ranks; print on rank 0."""
    from rich.console import Console

    from miles.analysis import measure
    from miles.analysis.analyze import analyze
    from miles.analysis.causes import attribute
    from miles.analysis.result import result, show
    from miles.analysis.verdict import ORDER, exceeded, judge

    state = analyze(given.run_dir, ranks, given.first, given.last, given.core, given.renamed)
    if ranks.rank:
        return OK
    tokens = measure.token_metrics(state, given.core)
    if not measure.counts_of(state)["sequences"]:
        raise UserError(f"{given.run_dir}: nothing to compare: no step that was trained on{' lies between those bounds' if given.first or given.last else ''}")
    causes = [] if given.core else attribute(state.evidence)
    verdict = judge(tokens, {} if given.core else measure.intervals(state), causes)
    failures = exceeded(tokens, {} if given.core else measure.sequence_metrics(state), dict(given.above), dict(given.below))
    if ORDER.index(verdict.word) > ORDER.index(given.at_worst):
        failures.insert(0, f"the verdict is {verdict.word}, and at worst {given.at_worst} passes")
    found = {**result(given.run_dir, state, tokens, verdict, given.core, causes), "failures": failures}
    if given.json:
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        from miles.data.store.run_dir import RunDir
        from miles.report.records import read_run
        from miles.report.token_text import TokenText, load_token_text

        whole = RunDir(given.run_dir).run_yaml.is_file()
        texts = load_token_text(read_run(given.run_dir)) if whole else TokenText(None)
        show(found, texts.pieces, Console(highlight=False))
        for failure in failures:
            print(f"FAILED: {failure}")
    return FAILED if failures else OK


if __name__ == "__main__":
    run(main)
