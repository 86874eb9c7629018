"""Compare two checkpoints of either format tensor by tensor, under Hugging Face names. Exit code 0: equal bits; 1: different.

examples:
  python tools/convert/verify.py models/Qwen3-30B-A3B ckpt/qwen3-30b
  python tools/convert/verify.py ckpt/a/release ckpt/b/iter_0000100 --hf models/Qwen3-30B-A3B --json
"""

import sys

sys.path[: not sys.flags.safe_path] = [__file__.rpartition("/tools/")[0] or "."]  # the repository; this folder's inspect.py would hide Python's

from miles.convert.command import parser, run, say, size  # noqa: E402


def main() -> int:
    options = parser(__doc__)
    options.add_argument("first", help="Hugging Face folder or torch_dist checkpoint")
    options.add_argument("second", help="the other")
    options.add_argument("--hf", metavar="FOLDER", help="folder with config.json for a torch_dist checkpoint that keeps none")
    given = options.parse_args()
    from miles.convert.verify import verify

    found = verify(given.first, given.second, given.hf, quiet=False)
    lines = [f"only in {given.first}: {name}" for name in found.only_first] + [f"only in {given.second}: {name}" for name in found.only_second]
    for entry in found.different:
        gap = f", largest difference {entry['largest']:.6g}" if "largest" in entry else ""
        lines.append(f"{entry['name']}: {entry['what']}{gap}")
    lines.append(f"{'equal' if found.equal else 'DIFFERENT'}: {found.compared} tensors compared, {size(found.bytes)} read")
    say(found.as_json(), lines, given.json)
    return 0 if found.equal else 1


if __name__ == "__main__":
    run(main)
