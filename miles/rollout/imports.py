"""User functions by import path: `package.module.function` or `package.module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from miles.config.exits import UserError


def load_function(path: str, option: str) -> Callable[..., Any]:
    """The function that `path` names. Raises UserError that names the option, the path and what is missing."""
    module_name, _, name = path.replace(":", ".").rpartition(".")
    if not module_name:
        raise UserError(f"{option}: {path!r} is no import path; write package.module.function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{option}: can't import {module_name} ({error}); set PYTHONPATH, or mend the path {path}") from error
    except Exception as error:  # the user's module runs on import and may raise anything
        raise UserError(f"{option}: importing {module_name} raised {type(error).__name__}: {' '.join(str(error).split())}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{option}: {module_name} has no function {name!r}; mend the path {path}")
    return function
