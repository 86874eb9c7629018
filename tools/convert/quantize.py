"""Quantise a Hugging Face folder, or turn a quantised one back into bf16. No GPU, a strip of a matrix in memory at a time.

examples:
  python tools/convert/quantize.py models/Qwen3-30B-A3B models/Qwen3-30B-A3B-FP8 --method fp8
  python tools/convert/quantize.py models/Qwen3-30B-A3B models/Qwen3-30B-A3B-INT4 --method int4 --group-size 32
  python tools/convert/quantize.py models/DeepSeek-V3 models/DeepSeek-V3-bf16 --method bf16

Linear layers are quantised; embeddings, output layer, norms and routers stay as they are.
"""

import sys

sys.path[: not sys.flags.safe_path] = [__file__.rpartition("/tools/")[0] or "."]  # the repository; this folder's inspect.py would hide Python's

from miles.convert.command import number, parser, run, say  # noqa: E402


def main() -> int:
    options = parser(__doc__)
    options.add_argument("source", help="Hugging Face folder")
    options.add_argument("output", help="new folder, or one with an unfinished conversion of the same source")
    options.add_argument("--method", required=True, choices=["fp8", "int4", "bf16"], help="what to write")
    options.add_argument("--power-of-two", action="store_true", help="FP8 scales rounded up to powers of two (ue8m0)")
    options.add_argument("--group-size", type=number(8), default=32, metavar="N", help="numbers of a row that share an INT4 scale (default 32)")
    options.add_argument("--strict", action="store_true", help="refuse NaN also in what stays as it is, and in bf16, instead of warning")
    options.add_argument("--workers", type=number(1), default=4, metavar="N", help="threads of this process (default 4)")
    given = options.parse_args()
    from miles.convert.quantize import Target, quantize
    from miles.convert.units import here

    me = here(given.workers)
    report = quantize(given.source, given.output, Target(given.method, given.power_of_two, given.group_size, given.strict), me, quiet=False)
    if me.rank:
        return 0  # rank 0 speaks for all
    say(vars(report), [*report.warning_lines, f"{report.output}: {report.tensors} tensors read, {report.files} files written{report.resumed}"], given.json)
    return 0


if __name__ == "__main__":
    run(main)
