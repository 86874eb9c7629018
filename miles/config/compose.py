"""One RunConfig from YAML files, public flags and dotted overrides; later values win.

A file may name others that it builds on: `defaults: [clusters/local, models/qwen3-4b]` (from its own folder, or from the
configs/ that miles ships). Every error is one ConfigError of one line: where, what, and the mend.
"""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from miles.config.exits import ConfigError
from miles.config.explain import explain, place, section_keys
from miles.config.options import check_sglang, flag_values
from miles.config.resolve import resolved
from miles.config.schema import RunConfig
from miles.config.yaml_file import Dumper, Key, parse_value, read_yaml, shortened

SGLANG = ("rollout", "sglang")

__all__ = ["ConfigError", "configs_dir", "dump_config", "load_config", "resolved"]


def load_config(paths: Sequence[Path | str] = (), overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None, kept: Mapping[str, Any] | None = None) -> RunConfig:
    """The validated, resolved configuration of a run.

    paths: YAML files, merged in order. flags: public option name (no dashes in front) to value, as parse_flags gives them.
    overrides: `train.optimizer.lr=1e-4`. kept: dotted path to the value of a key that none of them gives. Raises ConfigError.
    """
    tree: dict[str, Any] = {}
    origin: dict[Key, str] = {}
    for path in paths:
        _merge_file(tree, origin, _find(Path(path), None, "no such file"), ())
    if flags:
        for dotted, value, name in flag_values(flags):
            _set(tree, origin, tuple(dotted.split(".")), value, name)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted.strip():
            raise ConfigError(f"{shortened(override)}: not an override; write key=value, such as train.optimizer.lr=1e-4")
        where = f"{dotted}={shortened(text)}"
        _set(tree, origin, tuple(dotted.strip().split(".")), parse_value(text, where), where)
    for dotted, value in (kept or {}).items():
        _set_default(tree, dotted.split("."), value)
    try:
        config = RunConfig.model_validate(tree, strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, origin)) from None
    config = _count_from_warmup(config, origin)
    check_sglang(config, {name: place((*SGLANG, name), origin) for name in config.rollout.sglang})
    return resolved(config, origin)


def _count_from_warmup(config: RunConfig, origin: Mapping[Key, str]) -> RunConfig:
    """--lr-decay-iters counts the warm-up in, as Megatron does; its field does not."""
    optimizer = config.train.optimizer
    if optimizer.lr_decay_steps is None or origin.get(("train", "optimizer", "lr_decay_steps")) != "--lr-decay-iters":
        return config
    steps = optimizer.lr_decay_steps - optimizer.lr_warmup_steps
    if steps < 1:
        raise ConfigError(
            f"--lr-decay-iters: {optimizer.lr_decay_steps} with a warm-up of {optimizer.lr_warmup_steps} leave no step to decay; "
            "raise it, or lower train.optimizer.lr_warmup_steps"
        )
    train = config.train.model_copy(update={"optimizer": optimizer.model_copy(update={"lr_decay_steps": steps})})
    return config.model_copy(update={"train": train})


def dump_config(config: RunConfig) -> str:
    """YAML text of every field; load_config of it gives an equal configuration."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def configs_dir() -> Path:
    """configs/ of a source tree or editable install, else the installed copy under the environment's share/."""
    root = Path(__file__).resolve().parents[2]
    return root / "configs" if (root / "setup.cfg").is_file() else Path(sys.prefix) / "share" / "miles" / "configs"


def _find(path: Path, beside: Path | None, problem: str) -> Path:
    """The file that `path` names, with or without .yaml: as given (or beside the file that names it), then in configs/."""
    folders = [beside if beside is not None else Path(), configs_dir()]
    names = [path] if path.suffix in (".yaml", ".yml") or not path.name else [path.with_name(path.name + ".yaml"), path]  # "." and "/" have no name
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    directory = next((folder / path for folder in folders if (folder / path).is_dir()), None)
    if directory is not None:
        raise ConfigError(f"{path}: is a folder, not a recipe; {_inside(path, directory)}")
    known = [found.relative_to(folder).with_suffix("").as_posix() for folder in folders[1:] for found in sorted(folder.rglob("*.yaml"))]
    beside_it = sorted((folders[0] / path).parent.glob("*.yaml"))
    known += [name.as_posix() for found in beside_it for name in (found, found.with_suffix(""))]
    wanted = path.with_suffix("").as_posix() if path.suffix in (".yaml", ".yml") else path.as_posix()
    near = difflib.get_close_matches(wanted, known, 1, 0.6) or difflib.get_close_matches(path.as_posix(), known, 1, 0.6)
    there = "give a YAML file" if beside is None else f"give a YAML file's path from {beside}"
    mend = f"did you mean {near[0]}?" if near else f"{there}, or a name below {configs_dir()}"
    raise ConfigError(f"{path}: {problem}; {mend}")


def _inside(path: Path, directory: Path) -> str:
    """What to give instead of a folder."""
    if (directory / "run.yaml").is_file():
        return f"it holds a run: resume it with `miles-submit run {shlex.quote(str(path))}`, or give {path / 'run.yaml'}"
    names = [(path / found.name).with_suffix("").as_posix() for found in sorted(directory.glob("*.yaml"))]
    return f"give one of {', '.join(names)}" if names else "give a YAML file"


def _merge_file(tree: dict[str, Any], origin: dict[Key, str], path: Path, including: tuple[Path, ...]) -> None:
    here = path.resolve()
    if here in including:
        raise ConfigError(f"{path}: defaults go in a circle ({' -> '.join(p.name for p in (*including, here))}); remove one of them")
    data, lines = read_yaml(path)
    defaults = data.pop("defaults", None) or []
    where = lines.pop(("defaults",), str(path))
    if not isinstance(defaults, list) or not all(isinstance(name, str) for name in defaults):
        raise ConfigError(f"{where}: defaults: expected a list of files, got {defaults!r}; write defaults: [clusters/local]")
    for name in defaults:
        found = _find(Path(name), path.parent, f"no such file, named in defaults ({where})")
        _merge_file(tree, origin, found, (*including, here))
    _merge(tree, data, ())
    origin.update(lines)


def _merge(tree: dict[str, Any], data: dict[str, Any], key: Key) -> None:
    """Deep merge; lists and scalars replace. A section with nothing below it (`train:`) changes nothing."""
    for name, value in data.items():
        here = (*key, name)
        if value is None and here in section_keys():
            continue
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], value, here)
        elif isinstance(value, dict):
            tree[name] = {}
            _merge(tree[name], value, here)
        else:
            tree[name] = value


def _set_default(tree: Any, key: Sequence[str], value: Any) -> None:
    for name in key[:-1]:
        tree = tree.setdefault(name, {}) if isinstance(tree, dict) else None
    if isinstance(tree, dict) and tree.get(key[-1]) is None:  # else validation says what is wrong
        tree[key[-1]] = value


def _set(tree: dict[str, Any], origin: dict[Key, str], key: Key, value: Any, where: str) -> None:
    nested: dict[str, Any] = {key[-1]: value}
    for name in reversed(key[:-1]):
        nested = {name: nested}
    _merge(tree, nested, ())
    for length in range(1, len(key)):
        origin.setdefault(key[:length], where)
    origin[key] = where
