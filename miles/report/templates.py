"""What all pages share: the frame, the style sheet, and how a page gets to its place."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

TEMPLATES = Path(__file__).parent
GENERATOR = "miles"  # by which a page is known as one of ours


def fill(template: str, **values: Any) -> str:
    """A page as text. Every value is escaped unless it is Markup."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    style = Markup((TEMPLATES / "page.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, generator=GENERATOR, **values)


def put(page: str, target: Path) -> None:
    """Write a page whole or not at all, over what is there."""
    temporary = target.with_suffix(f".{time.time_ns()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
