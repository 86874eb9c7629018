"""Record the names and types of SGLang's server arguments: python tools/record_sglang_arguments.py VERSION WHEEL > miles/config/sglang_arguments.json

WHEEL is the unmodified wheel of that version (pip download --no-deps sglang==VERSION). It is read as text, never imported.
"""

import ast
import json
import re
import sys
import zipfile


def simple_type(annotation: str) -> str:
    """bool, int, float, str, list[...] or json."""
    inner = re.sub(r"^Optional\[(.*)\]$", r"\1", annotation)
    if inner in ("bool", "int", "float", "str"):
        return inner
    if inner.startswith("Literal["):
        return "str"
    listed = re.fullmatch(r"List\[(int|float|str)\]", inner)
    return f"list[{listed[1]}]" if listed else "json"


def main(version: str, wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tree = ast.parse(archive.read("sglang/srt/server_args.py"))
    (server_args,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ServerArgs"]
    types: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for field in server_args.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        name, annotation = field.target.id, field.annotation
        if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "A":
            annotation, about = annotation.slice.elts  # type: ignore[attr-defined]
            for keyword in getattr(about, "keywords", []):
                if keyword.arg in ("aliases", "cli_name"):
                    given = ast.literal_eval(keyword.value)
                    aliases |= {flag.removeprefix("--"): name for flag in ([given] if isinstance(given, str) else given)}
        types[name] = simple_type(ast.unparse(annotation))
    for call in (node for node in ast.walk(server_args) if isinstance(node, ast.Call)):  # older spellings
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if "dest" in given and "action" in given and ast.unparse(given["action"]) == "DeprecatedAliasStoreAction":
            flag, name = ast.literal_eval(call.args[0]).removeprefix("--"), ast.literal_eval(given["dest"])
            if flag.replace("-", "_") not in types:
                aliases[flag] = name
    json.dump({"version": version, "types": types, "aliases": aliases}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
