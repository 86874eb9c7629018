"""What a command says on stdout, whose reader (head, less) may leave before the end: the exit code is that of what was found, read or not."""

from __future__ import annotations

import os
import sys


def put(text: str) -> None:
    """print() and flush."""
    try:
        print(text)
    except BrokenPipeError:
        hush()
    flush()


def flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        hush()


def hush() -> None:
    """What is still to be said, and what is buffered, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """Text in one line that does nothing to a terminal: control characters and line ends as escapes."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape", "backslashreplace").decode() for letter in text)
