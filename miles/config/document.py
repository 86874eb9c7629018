"""docs/options.md from the schema and the table of options: python -m miles.config.document > docs/options.md"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from miles.config.explain import fields, without_none
from miles.config.options import Option, kind_of, sglang_arguments, table
from miles.config.schema import RunConfig

HEAD = """# Options

Made by `python -m miles.config.document > docs/options.md`; a test keeps it current.

A run is YAML files, public options and dotted overrides, later ones winning:
`miles-submit run recipe.yaml --lr 1e-4 train.optimizer.lr=1e-4` (the last two say the same). A file may build on others:
`defaults: [clusters/local, models/qwen3-4b]`. `run.yaml` in the run directory has every value written out.

## Configuration
"""


def markdown() -> str:
    """The whole page."""
    lines = [HEAD]
    for section in _sections():
        path = ".".join(section)
        lines += [f"### {path or 'top level'}", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(key) for key in fields() if key[:-1] == section and not _is_section(key)]
        lines.append("")
    options = list(table().values())
    lines += ["## Public options", "", "The names of miles and slime, and what they set here.", "", "| option | sets | unit | meaning |", "| --- | --- | --- | --- |"]
    lines += [_option(option) for option in options if option.to]
    lines.append(f"| `--sglang-*` | `rollout.sglang.*` |  | one of SGLang's {len(sglang_arguments())} server arguments, checked by name and type |")
    lines += ["", "## Accepted at one value", "", "| option | value | why |", "| --- | --- | --- |"]
    lines += [f"| `--{o.name}` | {'present' if o.switch else o.value} | {o.why} |" for o in options if o.fixed]
    lines += ["", "## Refused by name", "", "| option | why |", "| --- | --- |"]
    lines += [f"| `--{o.name}` | {o.why} |" for o in options if o.why and not o.fixed]
    return "\n".join(lines) + "\n"


def _sections() -> list[tuple[str, ...]]:
    return [(), *(key for key in fields() if _is_section(key))]


def _is_section(key: tuple[str, ...]) -> bool:
    inner = without_none(fields()[key].annotation)
    return isinstance(inner, type) and issubclass(inner, BaseModel)


def _row(key: tuple[str, ...]) -> str:
    field = fields()[key]
    inner = without_none(field.annotation)
    kind = " \\| ".join(map(str, get_args(inner))) if get_origin(inner) is Literal else kind_of(field.annotation)
    return f"| {key[-1]} | {kind} | {_default(key)} | {_cell(field.description)} |"


def _default(key: tuple[str, ...]) -> str:
    """The default in its place: a section may give its own (evaluation is greedy)."""
    value: Any = RunConfig()
    for name in key:
        value = getattr(value, name, None)
    return "" if value is None else f"`{json.dumps(value)}`"


def _option(option: Option) -> str:
    description = fields()[tuple(option.to[0].split("."))].description or ""
    unit = re.search(r"\[([^\]]*)\]$", description.partition(";")[0].strip())
    names = ", ".join(f"`--{name}`" for name in (option.name, *option.aliases))
    sets = ", ".join(f"`{path}`" for path in option.to)
    if option.switch:
        sets += f" = {json.dumps(option.value)}"
    if option.map:
        sets += " = " + ", ".join(f"{json.dumps(value)} for {given}" for given, value in option.map.items())
    meaning = description + (f" ({option.note})" if option.note else "")
    return f"| {names} | {sets} | {unit[1] if unit else ''} | {_cell(meaning)} |"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
