"""Does speculative decoding pay? Accept lengths by step, place in the response, weight version, engine and prompt source.

examples:
  python tools/analyze/speculative.py runs/speculative
  python tools/analyze/speculative.py runs/speculative --html speculative.html

Reads the marks of drafted tokens; where tokens have none, the counts of samples (`spec_info` of imported dumps).
Exit codes: 0, or 78: the input is wrong, or nothing was drafted, which is never a result.
"""

import sys
from pathlib import Path

sys.path[: not sys.flags.safe_path] = [__file__.rpartition("/tools/")[0] or "."]  # the repository

from miles.analysis.tools.findings import add_options, chosen, tell  # noqa: E402
from miles.convert.command import parser, run  # noqa: E402


def main() -> int:
    options = parser(__doc__)
    options.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    add_options(options)
    given = chosen(options)
    from miles.analysis.speculative import speculative
    from miles.analysis.tools.speculative import findings

    return tell(findings(speculative(given.run_dir, given.first, given.last)), given.json, given.html)


if __name__ == "__main__":
    run(main)
