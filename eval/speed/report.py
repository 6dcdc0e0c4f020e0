"""What subjects of `eval.speed` have in common in what they report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.errors import UsageError


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a results file, of a subject that is not drawn. A subject adds its table."""

    measured: tuple[dict[str, Any], ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return them."""
        return list(self.measured)

    @property
    def failure(self) -> str | None:
        """What went wrong although there are rows, None if nothing did."""
        return None

    def draw(self, path: Path) -> None:
        """Refuse: there is no picture of this subject."""
        raise UsageError(f"--picture {path}: only the kernels are drawn")
