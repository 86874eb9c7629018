"""Two runs or more side by side: reward, length, mismatch and speed by step; settings that differ; the first step at which the runs do.

examples:
  python tools/analyze/compare_runs.py runs/a runs/b
  python tools/analyze/compare_runs.py runs/a runs/b runs/c --first 100 --html compare.html
  python tools/analyze/compare_runs.py runs/a runs/again --same        # for CI: exit code 1 unless they computed the same bits

Exit codes: 0; 1: --same, and they differ; 78: the input is wrong, or they have no step in common, which is never a result.
"""

import sys
from pathlib import Path

sys.path[: not sys.flags.safe_path] = [__file__.rpartition("/tools/")[0] or "."]  # the repository

from miles.analysis.tools.findings import add_options, chosen, tell  # noqa: E402
from miles.config.exits import UserError  # noqa: E402
from miles.convert.command import parser, run  # noqa: E402

DIFFER = 1


def main() -> int:
    options = parser(__doc__)
    options.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    options.add_argument("--same", action="store_true", help="fail unless metrics other than speed and all batches have the same bits")
    add_options(options)
    given = chosen(options)
    try:
        from miles.analysis.compare_runs import compare, differs
        from miles.analysis.tools.compare_runs import findings

        found = compare(given.run_dirs, given.first, given.last)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'miles[analyze]'") from None
    code = tell(findings(found), given.json, given.html)
    if given.same and (said := differs(found)):
        print(f"FAILED: the runs differ: {'; '.join(said)}", file=sys.stderr)
        return DIFFER
    return code


if __name__ == "__main__":
    run(main)
