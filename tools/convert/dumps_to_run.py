"""Turn the .pt dumps of slime or miles (--dump-details, --save-debug-rollout-data, --save-debug-train-data) into a run directory that tools/analyze reads.

examples:
  python tools/convert/dumps_to_run.py --dumps dump_details --output runs/theirs        # its rollout_data/ and train_data/
  python tools/convert/dumps_to_run.py --rollout data_*.pt --train train_*_*.pt --output runs/theirs --reward-key score
  python tools/analyze/logprob_mismatch.py runs/theirs

Needs torch and no GPU. Files are read by an allow-list (tensors, numpy arrays, plain values); a file with anything else is refused by name. Nothing is
written over: the output is new, and there is none before all of it is written. Exit codes: 0, or 78: a file can't be used, by name.
"""

import sys
from pathlib import Path

sys.path[: not sys.flags.safe_path] = [__file__.rpartition("/tools/")[0] or "."]  # the repository; this folder's inspect.py would hide Python's

from miles.config.exits import UserError  # noqa: E402
from miles.convert.command import parser, run, say  # noqa: E402
from miles.data.importers.written import check_target  # noqa: E402


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--dumps", type=Path, metavar="FOLDER", help="of --dump-details: rollout_data/ and train_data/")
    options.add_argument("--rollout", type=Path, nargs="+", default=[], metavar="FILE", help="rollout dumps, …{rollout_id}.pt")
    options.add_argument("--train", type=Path, nargs="+", default=[], metavar="FILE", help="train dumps, …{rollout_id}_{rank}.pt")
    options.add_argument("--output", type=Path, required=True, metavar="RUN_DIR", help="new run directory")
    options.add_argument("--reward-key", metavar="KEY", help="which part of a reward counts, where rewards are objects")
    options.add_argument("--samples-per-prompt", type=int, default=1, metavar="N", help="size of a group where dumps don't say (default 1)")
    given = options.parse_args()
    rollout, train = list(given.rollout), list(given.train)
    if given.dumps is not None:
        if not given.dumps.is_dir():
            raise UserError(f"{given.dumps}: no such folder; give the one of --dump-details")
        rollout += sorted((given.dumps / "rollout_data").glob("*.pt"))
        train += sorted((given.dumps / "train_data").glob("*.pt"))
    if given.samples_per_prompt < 1:
        raise UserError(f"--samples-per-prompt: 1 or more expected, {given.samples_per_prompt} found")
    check_target(given.output)  # before torch is loaded
    try:
        from miles.data.importers.dumps import import_dumps
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'miles[train]'") from None

    counts, notes = import_dumps(rollout, train, given.output, given.reward_key, given.samples_per_prompt)
    lines = [f"{given.output}: {counts.samples} samples of {counts.steps} steps, {counts.tokens} tokens; {counts.trained} samples with the trainer's log-probs"]
    say({"output": str(given.output), **vars(counts), "notes": notes}, lines + [f"{count} {words}" for words, count in sorted(notes.items())], given.json)
    return 0


if __name__ == "__main__":
    run(main)
