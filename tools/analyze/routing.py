"""How even is the load of a mixture's experts, and how often did training route a token otherwise than rollout?

examples:
  python tools/analyze/routing.py runs/moe
  python tools/analyze/routing.py runs/moe --first 100 --experts 128 --html routing.html

Reads the routes beside the batches (rollout.return_routed_experts) and route_miss of train records; either will do.
Exit codes: 0, or 78: the input is wrong, or neither is recorded, which is never a result.
"""

import sys
from pathlib import Path

sys.path[: not sys.flags.safe_path] = [__file__.rpartition("/tools/")[0] or "."]  # the repository

from miles.analysis.tools.findings import add_options, chosen, tell  # noqa: E402
from miles.convert.command import parser, run  # noqa: E402


def main() -> int:
    options = parser(__doc__)
    options.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    options.add_argument("--experts", type=int, metavar="N", help="experts of a layer (default: the greatest number met and 1)")
    add_options(options)
    given = chosen(options)
    from miles.analysis.routing import routing
    from miles.analysis.tools.routing import findings

    return tell(findings(routing(given.run_dir, given.first, given.last, given.experts)), given.json, given.html)


if __name__ == "__main__":
    run(main)
