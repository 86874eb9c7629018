"""What a conversion did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """bytes: of the tensors. resumed_files: those that an earlier attempt had written."""

    output: str
    tensors: int
    bytes: int
    files: int
    resumed_files: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def resumed(self) -> str:
        """As a script says it."""
        return f" ({self.resumed_files} were there already)" if self.resumed_files else ""

    @property
    def warning_lines(self) -> list[str]:
        """As a script prints them."""
        return [f"warning: {line}" for line in self.warnings]
