"""Where did the time go? Phases of every process, idle time, and time in which nobody worked; as a picture, and as a trace for chrome://tracing or Perfetto.

examples:
  python tools/analyze/timeline.py runs/quickstart
  python tools/analyze/timeline.py runs/quickstart --first 100 --last 110 --html timeline.html
  python tools/analyze/timeline.py runs/quickstart --chrome trace.json      # open it at ui.perfetto.dev

Exit codes: 0, or 78: the input is wrong, or no phase was recorded, which is never a result.
"""

import sys
from pathlib import Path

sys.path[: not sys.flags.safe_path] = [__file__.rpartition("/tools/")[0] or "."]  # the repository

from miles.analysis.tools.findings import add_options, chosen, tell  # noqa: E402
from miles.convert.command import parser, run  # noqa: E402


def main() -> int:
    options = parser(__doc__)
    options.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    options.add_argument("--chrome", type=Path, metavar="FILE", help="write a trace (JSON); an older one of ours is replaced")
    add_options(options)
    given = chosen(options)
    from miles.analysis.timeline import read_timeline, refuse_other_traces, timeline, write_trace
    from miles.analysis.tools.timeline import findings
    from miles.data.store.events import PassedOver

    if given.chrome is not None:
        refuse_other_traces(given.chrome)
    passed = PassedOver()
    attempts = read_timeline(given.run_dir, given.first, given.last, passed)
    if given.chrome is not None:
        write_trace(attempts, given.chrome)
    return tell(findings(timeline(given.run_dir, attempts, passed), attempts), given.json, given.html)


if __name__ == "__main__":
    run(main)
