"""``anabranch compare``: several designs at one budget, with paired seeds."""

from typing import Annotated

import typer


def compare(
    designs: Annotated[list[str], typer.Argument(metavar="DESIGN...", help="Presets, the first is the baseline.")],
) -> None:
    """Train several designs at one budget."""
