"""Say what is in a checkpoint of either format: tensors, sizes, dtypes, layout, MTP.

examples:
  python tools/convert/inspect.py models/DeepSeek-V3
  python tools/convert/inspect.py ckpt/dsv3 --tensors
  python tools/convert/inspect.py ckpt/dsv3 --json | jq .mtp_layers
"""

import sys

sys.path[: not sys.flags.safe_path] = [__file__.rpartition("/tools/")[0] or "."]  # the repository; this folder's inspect.py would hide Python's

from miles.convert.command import parser, run, say, size  # noqa: E402


def main() -> int:
    options = parser(__doc__)
    options.add_argument("folder", help="Hugging Face folder or torch_dist checkpoint")
    options.add_argument("--tensors", action="store_true", help="list every tensor")
    given = options.parse_args()
    from miles.convert.look import inspect

    found = inspect(given.folder)
    dtypes = ", ".join(f"{name} {size(count)}" for name, count in found.dtypes.items())
    lines = [
        f"{found.folder}: {found.format}, {found.family or 'unknown family'}",
        f"parameters  {found.parameters / 1e9:.3f} B in {len(found.tensors)} tensors, {size(found.bytes)}, {found.files} files",
        f"dtypes      {dtypes}",
        f"layout      {found.layout}",
        f"MTP layers  {found.mtp_layers or 'none'}",
    ]
    if found.refused:
        lines.append(f"converted   no: {found.refused}")
    lines += [f"also        {name}: {count if name == 'objects' else size(count)}" for name, count in found.other.items()]
    if given.tensors:
        width = max((len(tensor["name"]) for tensor in found.tensors), default=0)
        lines += [f"{tensor['name']:<{width}}  {tensor['dtype']:<9} {tensor['shape']}" for tensor in found.tensors]
    say(found.as_json(), lines, given.json)
    return 0


if __name__ == "__main__":
    run(main)
