"""Turn a JSON Lines export of samples (token ids, log-probs of both sides, masks, rewards) into a run directory that tools/analyze reads. No GPU, no torch.

examples:
  python tools/convert/jsonl_to_run.py samples.jsonl --output runs/theirs
  python tools/convert/jsonl_to_run.py step_*.jsonl.gz --output runs/theirs --groups-per-step
  python tools/analyze/logprob_mismatch.py runs/theirs

A line is a sample; docs/analysis.md has its fields. The lines of a step stand together. Nothing is written over: the output is new, and there is none
before all of it is written. Exit codes: 0, or 78: a line is wrong, by file, number and field.
"""

import sys
from pathlib import Path

sys.path[: not sys.flags.safe_path] = [__file__.rpartition("/tools/")[0] or "."]  # the repository; this folder's inspect.py would hide Python's

from miles.convert.command import parser, run, say  # noqa: E402


def main() -> int:
    options = parser(__doc__)
    options.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JSON Lines, .gz too; in the order given")
    options.add_argument("--output", type=Path, required=True, metavar="RUN_DIR", help="new run directory")
    options.add_argument("--groups-per-step", action="store_true", help="the numbers of groups begin anew in each step")
    given = options.parse_args()
    from miles.data.importers.jsonl import import_jsonl

    counts, ignored = import_jsonl(given.files, given.output, given.groups_per_step)
    lines = [f"{given.output}: {counts.samples} samples of {counts.steps} steps, {counts.tokens} tokens; {counts.trained} samples with the trainer's log-probs"]
    if ignored:
        lines.append(f"fields passed over: {', '.join(f'{name} ({count})' for name, count in sorted(ignored.items()))}")
    say({"output": str(given.output), **vars(counts), "fields_passed_over": ignored}, lines, given.json)
    return 0


if __name__ == "__main__":
    run(main)
