"""The public option names of miles and slime: options.yaml as a table, a command line as settings.

The table is data; argparse, made from it, does the parsing. Types, units and meanings come from the configuration's own fields.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import yaml

from miles.config.exits import ConfigError
from miles.config.explain import fields, without_none
from miles.config.schema import RunConfig
from miles.config.sglang import followed
from miles.config.yaml_file import shortened

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Option:
    """One public option. `to` is empty for fixed and refused ones; `why` is their reason."""

    name: str
    to: tuple[str, ...] = ()
    kind: str = "str"  # bool, int, float, str, list[...], json
    value: Any = True  # what a switch sets
    switch: bool = False
    map: Mapping[str, Any] | None = None
    last: bool = False
    of: str | None = None  # the option that sets the list of which this one sets one place
    place: int = 0
    add: int = 0
    fixed: bool = False
    why: str | None = None
    note: str | None = None
    aliases: tuple[str, ...] = ()


def kind_of(annotation: Any) -> str:
    """The short name of a field's type, None left out."""
    inner = without_none(annotation)
    if get_origin(inner) is list:
        return f"list[{get_args(inner)[0].__name__}]"
    if get_origin(inner) is dict:
        return "json"
    return inner.__name__ if inner in (bool, int, float) else "str"


@functools.cache
def table() -> dict[str, Option]:
    """Every public option by name, in the order of options.yaml."""
    raw = _raw()
    found: dict[str, Option] = {}
    for name, entry in raw["supported"].items():
        entry = {"to": entry} if isinstance(entry, str) else entry
        to = (entry["to"],) if isinstance(entry["to"], str) else tuple(entry["to"])
        kind = kind_of(fields()[tuple(to[0].split("."))].annotation)
        switch = "set" in entry or (kind == "bool" and "map" not in entry)
        part = {key: entry[key] for key in ("of", "place", "add") if key in entry}
        kind = kind[5:-1] if part else kind
        aliases = tuple(entry.get("aliases", ()))
        found[name] = Option(name, to, kind, entry.get("set", True), switch, entry.get("map"), entry.get("last", False), **part, note=entry.get("note"), aliases=aliases)
    for name, entry in raw["fixed"].items():
        only = entry["only"]
        found[name] = Option(name, kind=type(only).__name__, value=only, switch=only is True, fixed=True, why=entry["why"])
    for group in raw["refused"]:
        for name in group["names"]:
            found[name] = Option(name, why=group["why"])
    return found


@functools.cache
def sglang_arguments() -> dict[str, str]:
    """Names and types of the server arguments of the pinned SGLang."""
    return _sglang()["types"]


def public_paths() -> dict[str, str]:
    """Public option name, and alias, to its (first) path in the configuration."""
    supported = [option for option in table().values() if option.to]
    return {name: option.to[0] for option in supported for name in (option.name, *option.aliases)}


def parse_flags(argv: Sequence[str]) -> tuple[list[Path], list[str], dict[str, Any]]:
    """(recipe files, dotted overrides, public options by name without dashes) of a command line. Raises ConfigError, naming every refused option."""
    if any(word.startswith("-") for word in argv):
        given, unknown = _parser().parse_known_intermixed_args(list(argv))
        values = vars(given)
    else:
        values, unknown = {"settings": list(argv)}, []  # the parser of all options takes a fifth of a second to make
    positional = values.pop("settings", [])
    _refuse([name for name in values if name in table() and table()[name].why and not table()[name].fixed], unknown)
    overrides = [text for text in positional if re.match(r"[\w.]+=", text)]
    return [Path(text) for text in positional if text not in overrides], overrides, values


def flag_values(flags: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """(dotted path, value, "--name") of every given option; in the table's order, so that an option of evaluation wins over the one it inherits from."""
    order = {name: position for position, name in enumerate(table())}
    lists: dict[str, list[Any]] = {}
    for name in sorted(flags, key=lambda name: order.get(name, -1)):
        flag, value = f"--{name}", flags[name]
        if name.startswith("sglang-") and name not in order:
            yield f"rollout.sglang.{_sglang_name(name)}", value, flag
            continue
        if name not in order:
            _unknown(flag)
        option = table()[name]
        if option.fixed:
            if value != option.value:
                raise ConfigError(f"{flag} {value}: {option.why}; leave it out or give {option.value}")
            continue
        if option.why:
            raise ConfigError(f"{flag}: {option.why}")
        if option.map is not None:
            if value not in option.map:
                raise ConfigError(f"{flag} {value}: not there yet; give {' or '.join(option.map)}")
            value = option.map[value]
        if option.last:
            if len(value) != 2:
                raise ConfigError(f"{flag}: takes one pair, NAME PATH, got {len(value)} values; several evaluation sets are not there yet")
            value = value[-1]
        if option.of is not None:
            if option.of not in lists:
                raise ConfigError(f"{flag}: has no effect without --{option.of}; give both")
            lists[option.of][option.place] = value + option.add
            value = list(lists[option.of])
        elif isinstance(value, list):
            lists[name] = list(value)
        for path in option.to:
            yield path, value, flag


def check_sglang(config: RunConfig, where: Mapping[str, str]) -> None:
    """Refuse names and types that the pinned SGLang doesn't have, and arguments that miles sets itself (where they follow from the
    configuration: at another value). where: place by name, for the message."""
    known, owned, follow = sglang_arguments(), _raw()["sglang_owned"], followed(config)
    for name, value in config.rollout.sglang.items():
        place = where.get(name, "") + f"rollout.sglang.{name}"
        if name in owned:
            raise ConfigError(f"{place}: miles sets it; set {owned[name]}")
        if name in follow and value != follow[name].value:
            raise ConfigError(f"{place}: miles sets it to {json.dumps(follow[name].value)}; {follow[name].mend}")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.6)
            mend = f"did you mean {near[0]}?" if near else "leave it out"
            raise ConfigError(f"{place}: SGLang {_sglang()['version']} has no such server argument; {mend}")
        if value is not None and not _is(known[name], value):
            raise ConfigError(f"{place}: expected {WORDS[known[name]]}, got {json.dumps(value, default=str)}")


WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "json": "a JSON value",
    "list[str]": "texts",
    "list[int]": "whole numbers",
    "list[float]": "numbers",
}

CONVERT: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "json": json.loads}


def _is(kind: str, value: Any) -> bool:
    if kind.startswith("list["):
        return isinstance(value, list) and all(_is(kind[5:-1], item) for item in value)
    if kind in ("int", "float"):
        return isinstance(value, int if kind == "int" else (int, float)) and not isinstance(value, bool)
    return kind == "json" or isinstance(value, {"bool": bool, "str": str}[kind])


@functools.cache
def _raw() -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
    return yaml.load((HERE / "options.yaml").read_text(encoding="utf-8"), Loader=loader)


@functools.cache
def _sglang() -> dict[str, Any]:
    return json.loads((HERE / "sglang_arguments.json").read_text(encoding="utf-8"))


def _sglang_name(flag: str) -> str:
    name = flag.removeprefix("sglang-")
    return _sglang()["aliases"].get(name, name.replace("-", "_"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--[^/:]+)[^:]*", r"\1", message)  # without its aliases
        message = message.replace("expected one argument", "expected a value after it").replace("ignored explicit argument", "takes no value, got")
        raise ConfigError(message)


@functools.cache
def _parser() -> _Parser:
    parser = _Parser(prog="miles-submit", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*")
    for option in table().values():
        flags = [f"--{name}" for name in (option.name, *option.aliases)]
        if option.switch:
            parser.add_argument(*flags, dest=option.name, action="store_const", const=option.value)
        elif option.why and not option.fixed:
            parser.add_argument(*flags, dest=option.name, nargs="*")  # whatever it takes: it is refused
        elif option.map is not None:
            parser.add_argument(*flags, dest=option.name)
        elif option.last:
            parser.add_argument(*flags, dest=option.name, nargs="+")
        else:
            _add(parser, flags, option.name, option.kind)
    for name, kind in sglang_arguments().items():
        spellings = [name.replace("_", "-"), *(alias for alias, target in _sglang()["aliases"].items() if target == name)]
        flags = [f"--sglang-{spelling}" for spelling in dict.fromkeys(spellings) if f"sglang-{spelling}" not in table()]
        _add(parser, flags, "sglang-" + name.replace("_", "-"), kind)
    return parser


def _add(parser: argparse.ArgumentParser, flags: list[str], dest: str, kind: str) -> None:
    if kind == "bool":  # SGLang's switches: alone, or with true or false
        parser.add_argument(*flags, dest=dest, nargs="?", const=True, type=_convert("bool"))
    elif kind.startswith("list["):
        parser.add_argument(*flags, dest=dest, nargs="+", type=_convert(kind[5:-1]))
    else:
        parser.add_argument(*flags, dest=dest, type=_convert(kind))


def _convert(kind: str) -> Any:
    """A converter of one word; argparse puts the option's name before its message."""

    def convert(text: str) -> Any:
        try:
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            return CONVERT[kind](text)
        except (ValueError, KeyError, RecursionError):  # the last of JSON in thousands of brackets
            raise argparse.ArgumentTypeError(f"expected {WORDS[kind]}, got {shortened(text)!r}") from None

    return convert


def _refuse(refused: list[str], unknown: list[str]) -> None:
    reasons = [f"--{name}: {table()[name].why}" for name in refused]
    prefixes = {prefix: entry["why"] for prefix, entry in _raw()["prefixes"].items() if "why" in entry}
    for word in unknown:
        why = next((why for prefix, why in prefixes.items() if word.startswith(f"--{prefix}")), None)
        if why:
            reasons.append(f"{word.partition('=')[0]}: {why}")
        elif word.startswith("-"):
            _unknown(word.partition("=")[0])
    if reasons:
        raise ConfigError("; ".join(reasons))


def _unknown(flag: str) -> NoReturn:
    name = flag.lstrip("-").replace("_", "-")
    if tuple(flag.lstrip("-").split(".")) in fields():
        raise ConfigError(f"{flag}: not an option; write {flag.lstrip('-')}=VALUE")
    candidates = [*public_paths(), *(f"sglang-{argument.replace('_', '-')}" for argument in sglang_arguments()), *table()]
    near = difflib.get_close_matches(name, candidates, 1, 0.6)
    raise ConfigError(f"{flag}: unknown option; " + (f"did you mean --{near[0]}?" if near else "docs/options.md lists them all"))
