"""YAML with line numbers: plain data, and where each value was written.

Values follow YAML 1.2's core schema, so that `1e-4` is a number and `no`, `12:30` and `2026-01-01` are texts.
Duplicate keys are errors: the second would silently win. So are anchors that hold themselves, and files that aliases blow up.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from miles.config.exits import ConfigError

Key = tuple[str, ...]
CORE = ("null", "bool", "int", "float", "str", "seq", "map")  # the tags of the core schema
DEEPEST = 50  # levels of lists and keys inside each other
MOST = 100_000  # values, those that aliases repeat counted each time
LONGEST_NUMBER = 400  # characters; floats have fewer than 310 digits before the point
SHOWN = 60  # characters of a value in a message


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    yaml_constructors = {tag: build for tag, build in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag.rpartition(":")[2] in CORE}

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As PyYAML's; a text that its tag can't hold (`!!int abc`) is an error at its place."""
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ValueError, KeyError, AttributeError) as error:  # int(), a table of words, a pattern: whatever the constructor uses
            raise yaml.constructor.ConstructorError(None, None, f"{shortened(str(node.value))} is no !!{node.tag.rpartition(':')[2]}", node.start_mark) from error


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every text which YAML 1.1 or 1.2 would read as something else."""


for _tag, _pattern, _first in [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+0123456789.")),
    ("merge", r"<<", ["<"]),
]:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _represent_text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    # plain and in single quotes PyYAML leaves these line breaks of YAML 1.1 bare, and reads them back as white space
    broken = any(character in text for character in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if broken else None)


Dumper.add_representer(str, _represent_text)


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    # SafeLoader's own would read 010 as octal, as YAML 1.1 has it
    text = loader.construct_scalar(node)
    if len(text) > LONGEST_NUMBER:
        raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text)} digits", node.start_mark)
    return int(text, 16 if text.lower().startswith("0x") else 10)


Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def shortened(text: str) -> str:
    """A text of which a message shows the beginning."""
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def parse_value(text: str, where: str) -> Any:
    """The value of a dotted override, e.g. `1e-4`, `[1, 2]`, `cosine`."""
    try:
        return _read(text, lambda line: where)[0]
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {shortened(text)!r} is not a YAML value ({_problem(error)}); quote it") from None


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    """A file's mapping, and "file:line" of every key in it. An empty file is an empty mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    try:
        value, lines = _read(text, lambda line: f"{path}:{line}")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML ({_problem(error)}); check indentation, quotes and colons there") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({_problem(error)})") from None
    if value is None:
        return {}, lines
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a single value"
        raise ConfigError(f"{path}:1: expected keys and values at the top, got {kind}; write `section:` and its keys below")
    return value, lines


def _read(text: str, place: Callable[[int], str]) -> tuple[Any, dict[Key, str]]:
    """A document's value, and the place of every key. place: of a line, counted from 1."""
    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        lines: dict[Key, str] = {}
        if node is None:
            return None, lines
        _extent(node, {}, place)
        _walk(node, (), lines, place)
        return loader.construct_document(node), lines
    except RecursionError:  # of PyYAML's own functions, over what is nested far deeper than DEEPEST
        raise ConfigError(f"{place(1)}: lists or keys are nested more than {DEEPEST} deep; check the brackets") from None
    finally:
        if loader is not None:
            loader.dispose()


def _extent(node: yaml.Node, known: dict[int, tuple[int, int] | None], place: Callable[[int], str]) -> tuple[int, int]:
    """(levels, values) below a node with every alias written out; refuses what is without end, or too much. known: by id, None while at work."""
    children = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [each for pair in node.value for each in pair]
    known[id(node)] = None
    levels, values = 0, 1
    for child in children:
        if id(child) not in known:
            _extent(child, known, place)
        extent = known[id(child)]
        where = place(node.start_mark.line + 1)
        if extent is None:
            raise ConfigError(f"{where}: an anchor (&) holds an alias (*) of itself, so it has no end; remove the alias")
        levels, values = max(levels, 1 + extent[0]), values + extent[1]
        if levels > DEEPEST:
            raise ConfigError(f"{where}: lists or keys are nested more than {DEEPEST} deep; check the brackets")
        if values > MOST:
            raise ConfigError(f"{where}: more than {MOST} values, aliases (*) written out; shorten it")
    known[id(node)] = levels, values
    return levels, values


def _walk(node: yaml.Node, key: Key, lines: dict[Key, str], place: Callable[[int], str]) -> None:
    """Record the place of every key; refuse keys that are not texts and keys that come twice."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        where = place(key_node.start_mark.line + 1)
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        if key_node.tag != "tag:yaml.org,2002:str":
            shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "[…]"
            raise ConfigError(f"{where}: key {shortened(shown)!r} is not a text; quote it or remove it")
        here = (*key, key_node.value)
        if here in lines:
            first = f" (first in line {lines[here].rpartition(':')[2]})" if lines[here] != where else ""
            raise ConfigError(f"{where}: {'.'.join(here)}: given twice{first}; keep one")
        lines[here] = where
        _walk(value_node, here, lines, place)


def _problem(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error)
    return " ".join(str(problem).split())
