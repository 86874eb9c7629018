"""Convert a Hugging Face folder to a torch_dist checkpoint that Megatron loads at any parallel layout. No GPU, no model in memory.

examples:
  python tools/convert/hf_to_torch_dist.py --hf models/Qwen3-30B-A3B --output ckpt/qwen3-30b
  python tools/convert/hf_to_torch_dist.py --hf models/DeepSeek-V3 --output ckpt/dsv3 --mtp-num-layers 1 --workers 8
  python tools/convert/hf_to_torch_dist.py --hf deepseek-v3 --estimate           # before the download
  sbatch sbatch/convert.sbatch models/DeepSeek-V3 ckpt/dsv3        # several nodes; interrupted: the same command again

Writes OUTPUT/release/ and, last, OUTPUT/latest_checkpointed_iteration.txt: without it the folder is no checkpoint.
"""

import sys

sys.path[: not sys.flags.safe_path] = [__file__.rpartition("/tools/")[0] or "."]  # the repository; this folder's inspect.py would hide Python's

from miles.convert.command import number, parser, positive, run, say, size  # noqa: E402


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--hf", required=True, metavar="FOLDER", help="Hugging Face folder: config.json and safetensors (bf16, fp16, fp32 or FP8 blocks); for --estimate also a name from configs/models")
    options.add_argument("--output", metavar="FOLDER", help="new folder, or one with an unfinished conversion of the same source")
    options.add_argument("--mtp-num-layers", type=number(0), default=0, metavar="N", help="multi-token prediction layers to include (default 0)")
    options.add_argument("--init-mtp", choices=["copy-last", "random"], help="make MTP layers up where the source has none")
    options.add_argument("--make-vocab-size-divisible-by", type=number(1), default=1, metavar="N", help="pad the vocabulary with zeros (default 1)")
    options.add_argument("--tensor-model-parallel-size", type=number(1), default=1, metavar="N", help="multiplies the padding as in Megatron (default 1)")
    options.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="of the checkpoint (default: the source's; FP8 gives bfloat16)")
    options.add_argument("--strict", action="store_true", help="refuse NaN instead of warning")
    options.add_argument("--workers", type=number(1), default=4, metavar="N", help="threads of this process (default 4)")
    options.add_argument("--estimate", action="store_true", help="say bytes, memory and time, convert nothing; config.json is enough")
    options.add_argument("--disk", type=positive, default=1.0, metavar="GB/s", help="speed of the disk for --estimate (default 1.0)")
    given = options.parse_args()
    if given.estimate:
        from miles.convert.estimate import estimate

        found = estimate(
            given.hf, given.mtp_num_layers, given.make_vocab_size_divisible_by * given.tensor_model_parallel_size, given.workers, given.disk, given.dtype or "bfloat16"
        )
        say(found.as_json(), [
            f"{found.family}: {found.parameters / 1e9:.2f} B parameters in {found.tensors} tensors",
            f"writes {size(found.bytes)} ({found.dtype}) into {found.files} files; at {given.disk:g} GB/s about {found.seconds / 60:.1f} minutes",
            f"memory beyond Python and its libraries: {size(found.memory)} a process of {given.workers} workers",
        ], given.json)  # fmt: skip
        return 0
    if not given.output:
        options.error("--output is missing (or --estimate)")
    from miles.convert.hf_to_torch_dist import hf_to_torch_dist
    from miles.convert.options import Options
    from miles.convert.units import here

    chosen = Options(
        given.mtp_num_layers, given.init_mtp, given.make_vocab_size_divisible_by, given.tensor_model_parallel_size, given.dtype, given.strict
    )
    me = here(given.workers)
    report = hf_to_torch_dist(given.hf, given.output, chosen, me, quiet=False)
    if me.rank:
        return 0  # rank 0 speaks for all
    done = f"{report.output}: {report.tensors} tensors, {size(report.bytes)} in {report.files} files{report.resumed}"
    say(vars(report), [*report.warning_lines, done], given.json)
    return 0


if __name__ == "__main__":
    run(main)
