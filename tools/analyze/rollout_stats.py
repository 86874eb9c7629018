"""What did a run generate? Lengths, truncation, repetition, rewards, groups whose samples all have one reward, staleness: by step, prompt source and engine.

examples:
  python tools/analyze/rollout_stats.py runs/quickstart
  python tools/analyze/rollout_stats.py runs/quickstart --first 100 --html stats.html
  python tools/analyze/rollout_stats.py runs/quickstart --kind eval --json

Exit codes: 0, or 78: the input is wrong, or there is no such batch, which is never a result.
"""

import sys
from pathlib import Path

sys.path[: not sys.flags.safe_path] = [__file__.rpartition("/tools/")[0] or "."]  # the repository

from miles.analysis.tools.findings import add_options, chosen, tell  # noqa: E402
from miles.convert.command import parser, run  # noqa: E402


def main() -> int:
    options = parser(__doc__)
    options.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    options.add_argument("--kind", choices=["rollout", "eval", "sft"], default="rollout", help="batches to look at (default: rollout)")
    add_options(options)
    given = chosen(options)
    from miles.analysis.rollout_stats import rollout_stats
    from miles.analysis.tools.rollout_stats import findings

    return tell(findings(rollout_stats(given.run_dir, given.first, given.last, given.kind)), given.json, given.html)


if __name__ == "__main__":
    run(main)
