"""Convert a torch_dist checkpoint to a Hugging Face folder: one of hf_to_torch_dist, or what Megatron saved in training.

examples:
  python tools/convert/torch_dist_to_hf.py --torch-dist ckpt/qwen3-30b --output models/out
  python tools/convert/torch_dist_to_hf.py --torch-dist runs/x/iter_0000100 --hf models/Qwen3-30B-A3B --output models/step100

Optimizer state is passed over; padding of the vocabulary is cut off; MTP layers are written where the checkpoint has them.
"""

import sys

sys.path[: not sys.flags.safe_path] = [__file__.rpartition("/tools/")[0] or "."]  # the repository; this folder's inspect.py would hide Python's

from miles.convert.command import number, parser, run, say, size  # noqa: E402


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--torch-dist", required=True, metavar="FOLDER", help="the checkpoint, or the folder with its tracker file")
    options.add_argument("--output", required=True, metavar="FOLDER", help="new folder, or one with an unfinished conversion of the same source")
    options.add_argument("--hf", metavar="FOLDER", help="folder with the model's config.json and tokenizer (default: those kept in the checkpoint)")
    options.add_argument("--strict", action="store_true", help="refuse NaN instead of warning")
    options.add_argument("--workers", type=number(1), default=4, metavar="N", help="threads of this process (default 4)")
    given = options.parse_args()
    from miles.convert.torch_dist_to_hf import torch_dist_to_hf
    from miles.convert.units import here

    me = here(given.workers)
    report = torch_dist_to_hf(given.torch_dist, given.output, given.hf, me, quiet=False, strict=given.strict)
    if me.rank:
        return 0  # rank 0 speaks for all
    done = f"{report.output}: {report.tensors} tensors, {size(report.bytes)} in {report.files} files{report.resumed}"
    say(vars(report), [*report.warning_lines, done], given.json)
    return 0


if __name__ == "__main__":
    run(main)
