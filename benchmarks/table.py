"""What a benchmark found, as a table and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass
class Row:
    """A measured ratio; `goal` None: for information."""

    name: str
    ratio: float
    goal: float | None = None
    at_least: bool = True
    note: str = ""
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.goal is None:
            return None
        return self.ratio >= self.goal if self.at_least else self.ratio <= self.goal

    @property
    def goal_text(self) -> str:
        """Such as "at least 3.00x"."""
        return "" if self.goal is None else f"{'at least' if self.at_least else 'at most'} {self.goal:.2f}x"

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return {"name": self.name, "ratio": self.ratio, "goal": self.goal_text or None, "passed": self.passed, "note": self.note, **self.found}


def show(rows: list[Row], judged: bool = True) -> None:
    """Print the table."""
    table = Table("benchmark", "ratio", "goal", "", "measured")
    for column, style in ((1, "right"), (2, "left")):
        table.columns[column].justify = style  # type: ignore[assignment]
    for row in rows:
        verdict = {None: "", True: "[green]pass[/]", False: "[bold red]MISSED[/]"}[row.passed if judged else None]
        table.add_row(row.name, f"{row.ratio:.2f}x", row.goal_text, verdict, row.note)
    Console(width=170).print(table)
