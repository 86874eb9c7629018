"""YAML with line numbers: plain data, and where each value was written.

Values follow YAML 1.2's core schema, so that `1e-4` is a number and `no`, `12:30` and `2026-01-01` are texts.
Duplicate keys are errors: the second would silently win.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from miles.config.exits import ConfigError

Key = tuple[str, ...]


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


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
    return int(text, 16 if text.lower().startswith("0x") else 10)


Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_value(text: str, where: str) -> Any:
    """The value of a dotted override, e.g. `1e-4`, `[1, 2]`, `cosine`."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {text!r} is not a YAML value ({_problem(error)}); quote it") from None


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    """A file's mapping, and "file:line" of every key in it. An empty file is an empty mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        lines: dict[Key, str] = {}
        if node is None:
            return {}, lines
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
            raise ConfigError(f"{path}:1: expected keys and values at the top, got {kind}; write `section:` and its keys below")
        _walk(path, node, (), lines)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML ({_problem(error)}); check indentation, quotes and colons there") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({_problem(error)})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _walk(path: Path, node: yaml.Node, key: Key, lines: dict[Key, str]) -> None:
    """Record the line of every key; refuse keys that are not texts and keys that come twice."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        if key_node.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{where}: key {key_node.value!r} is not a text; quote it or remove it")
        here = (*key, key_node.value)
        if here in lines:
            first = lines[here].rpartition(":")[2]
            raise ConfigError(f"{where}: {'.'.join(here)}: given twice (first in line {first}); keep one")
        lines[here] = where
        _walk(path, value_node, here, lines)


def _problem(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error)
    return " ".join(str(problem).split())
