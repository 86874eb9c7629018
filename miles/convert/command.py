"""What the scripts of tools/convert share: one-line errors, exit codes, JSON, sizes in words."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from miles.config.exits import AGAIN, FULL, OK, WRONG, TryAgain, UserError, file_fault
from miles.config.stdout import flush, hush, printable


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line and exit with 78."""

    def error(self, message: str) -> Any:
        print(f"{self.prog}: {message}; --help shows all options", file=sys.stderr)
        sys.exit(WRONG)


def parser(text: str | None) -> Parser:
    """A parser with a script's docstring as its help, examples and all."""
    made = Parser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    return made


def number(at_least: int) -> Callable[[str], int]:
    """An option's whole number."""

    def read(word: str) -> int:
        found = int(word)
        if found < at_least:
            raise argparse.ArgumentTypeError(f"{word} is too small, at least {at_least}")
        return found

    read.__name__ = "whole number"  # argparse says "invalid whole number value"
    return read


def positive(word: str) -> float:
    """An option's number above 0."""
    found = float(word)
    if not (found > 0 and math.isfinite(found)):
        raise argparse.ArgumentTypeError(f"{word} is not a number above 0")
    return found


def run(main: Callable[[], int]) -> None:
    """Call a script's main and leave with its code; a user's mistake is one line on stderr and 78, a missing rank 75."""
    if sys.stdout is None:  # closed by who started us
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold any byte
    try:
        code = main()
        flush()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        code = WRONG
    except TryAgain as error:
        print(f"again: {error}", file=sys.stderr)
        code = AGAIN
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = AGAIN
    except BrokenPipeError:
        hush()
        code = OK
    except OSError as error:
        said = _disk_full(error) or file_fault(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        code = WRONG
    sys.exit(code)


def _disk_full(error: OSError) -> str | None:
    if error.errno not in FULL:
        return None
    return f"disk full{f' at {error.filename}' if error.filename else ''}: free some space, then run the same command again; files that are finished are kept"


def say(found: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """The result for a program or for a person."""
    print(json.dumps(found, indent=1) if as_json else "\n".join(lines))


def size(count: float) -> str:
    """1234567 as "1.2 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
