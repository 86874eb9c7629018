"""Functions of the user's that a run names by import path: is the module there, and does it define the name? Nothing is imported."""

from __future__ import annotations

import ast
import difflib
import importlib.machinery
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from miles.config.schema import RunConfig
from miles.plan.abilities import Entry
from miles.plan.inputs import own_eval_reward

UNSEEN = ("exec", "globals", "modules", "setattr", "vars")  # by these a module may get names that its text doesn't show


def unusable_functions(config: RunConfig, roots: Sequence[str] = ()) -> Iterator[Entry]:
    """Errors: a module that can't be found, a name that it doesn't define, or that is no function.

    roots: folders where functions are looked for before the working folder and the path."""
    folder = Path(config.model.hf_checkpoint) if config.model.hf_checkpoint else None
    paths = [("model.build", config.model.build if folder is None or not folder.exists() else None)]
    if config.warm_start.steps:
        paths.append(("warm_start.response_path", config.warm_start.response_path))
    if config.num_rollout:
        paths += [
            ("rollout.generate_path", config.rollout.generate_path),
            ("rollout.filter_path", config.rollout.filter_path),
            ("rollout.reward.path", config.rollout.reward.path),
        ]
    paths.append(("eval.reward.path", own_eval_reward(config)))
    for where, path in paths:
        fault = fault_of(path, roots) if path else None
        if fault:
            yield "error", where, *fault


def fault_of(path: str, roots: Sequence[str] = ()) -> tuple[str, str] | None:
    """(what is wrong, the mend) of `package.module.function`; None where nothing is, or its text doesn't tell."""
    module, _, name = path.replace(":", ".").rpartition(".")
    if not module:
        return None  # miles.plan.inputs refuses it
    missing = first_missing(module, roots)
    if missing:
        return f"no module {missing} ({path})", "mend the path, or put the module's folder on PYTHONPATH"
    a_module = f"{module}.{name} is a module, not a function", f"write {module}.{name}.FUNCTION"
    spec = _find(module, roots)
    assert spec is not None, "not missing"
    inside = first_missing(path.replace(":", "."), roots) is None
    source = Path(spec.origin) if spec.has_location and spec.origin and spec.origin.endswith(".py") else None
    if source is None:  # a folder without __init__.py, or compiled
        return a_module if inside and spec.origin is None else None
    try:
        text = ast.parse(source.read_bytes(), str(source))
    except SyntaxError as error:
        return f"{source}:{error.lineno}: not Python ({error.msg})", "mend it"
    except (OSError, ValueError):
        return None  # the import tells
    bound = _bound(text.body)
    if name in bound:
        kind = bound[name]
        if kind == "module":
            return a_module
        return (f"{path} is a {kind}, not a function", f"give a function of {module}") if kind else None
    if inside:
        return a_module
    if "*" in bound or "__getattr__" in bound or any(_word(node) in UNSEEN for node in ast.walk(text)):
        return None
    near = difflib.get_close_matches(name, [each for each, kind in bound.items() if kind in ("", None)], 1, 0.6)
    return f"{module} has no function {name!r}", f"did you mean {module}.{near[0]}?" if near else f"mend the path {path}"


def first_missing(module: str, roots: Sequence[str] = ()) -> str | None:
    """The first part of a dotted module name that can't be found here or on the path; None when all are there. Runs no user code."""
    parts = module.split(".")
    return next((name for length in range(1, len(parts) + 1) if _find(name := ".".join(parts[:length]), roots) is None), None)


def _find(module: str, roots: Sequence[str]) -> importlib.machinery.ModuleSpec | None:
    """Where a module would come from; without importing the packages that it lies in."""
    finder, (top, *rest) = importlib.machinery.PathFinder, module.split(".")
    if top == "__main__":
        return None  # of another process
    spec = finder.find_spec(top, [*roots, os.getcwd()]) or finder.find_spec(top) or importlib.util.find_spec(top)  # roles are started from this folder
    for part in rest:
        folders = spec.submodule_search_locations if spec else None
        # By its own name alone: below a folder without __init__.py the full name asks for the parent, which isn't imported.
        spec = finder.find_spec(part, list(folders)) if folders is not None else None
    return spec


def _bound(body: Sequence[ast.stmt]) -> dict[str, str | None]:
    """Names that a module's statements bind, the last binding counting: "" for a function or class, "module", "number" and the
    like for what is plainly no function, None where the text doesn't tell."""
    found: dict[str, str | None] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = ""
            found |= {name: None for inner in ast.walk(node) if isinstance(inner, ast.Global) for name in inner.names}
        elif isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.partition(".")[0]: "module" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: None for alias in node.names}
        else:
            found |= {inner.id: None for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)}
            if isinstance(node, ast.Assign | ast.AnnAssign) and (kind := _kind(node.value)):
                found |= {target.id: kind for target in (node.targets if isinstance(node, ast.Assign) else [node.target]) if isinstance(target, ast.Name)}
            for name in ("body", "orelse", "finalbody"):
                found |= _bound(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                found |= _bound(handler.body)
            for case in getattr(node, "cases", []):
                found |= _bound(case.body)
    return found


def _kind(value: ast.expr | None) -> str | None:
    if isinstance(value, ast.Constant):
        return {"str": "text", "int": "number", "float": "number"}.get(type(value.value).__name__, type(value.value).__name__)
    return {ast.List: "list", ast.Dict: "dict", ast.Set: "set", ast.Tuple: "tuple"}.get(type(value))


def _word(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
