"""Which adapter served which task and layer: its pictures, and the page that shows them."""
# Shapes: T tasks, M matrices, E adapters

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure

from anabranch.errors import DataError
from anabranch.files import atomic_write_json, atomic_write_text, parse_json
from anabranch.report.page import DASH, TIMES, Section, html
from anabranch.report.style import INK, SEQUENTIAL, figure, to_png, to_svg
from anabranch.report.tables import Column, Table
from anabranch.report.words import percent
from anabranch.report.write import save_picture

__all__ = ["FILES", "Use", "by_matrix", "by_task", "check_use_place", "explain_use", "write_use"]

FILES = ("adapters.html", "adapters.json", "tasks.png", "matrices.png")
WIDTH = 9.0  # inches
# What one picture has room for.
MOST_TASKS, MOST_PANELS, MOST_ADAPTERS, MOST_LABELS = 40, 6, 40, 48
_SHORT = {"blocks.": "", ".attention.": " ", ".feed_forward.": " ff "}
_LONG = 22


class Use(Protocol):
    """`anabranch.adapters.use.AdapterUse`."""

    @property
    def tasks(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def matrices(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def adapters(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def weight_TME(self) -> np.ndarray: ...  # noqa: D102
    @property
    def share_TE(self) -> np.ndarray: ...  # noqa: D102
    @property
    def tokens_T(self) -> tuple[int, ...]: ...  # noqa: D102

    def to_dict(self) -> dict[str, Any]: ...  # noqa: D102


def shown_adapters(use: Use) -> list[int]:
    """Numbers of the adapters that pictures show: all, or those with the most weight; in their order."""
    order_E = np.argsort(-use.share_TE.sum(0), kind="stable")[:MOST_ADAPTERS]
    return sorted(order_E.tolist())


def shown_tasks(use: Use, most: int) -> list[int]:
    """Numbers of the tasks that pictures show: all, or those whose shares are furthest from the mean; in their order."""
    share_TE = use.share_TE
    apart_T = np.abs(share_TE - share_TE.mean(0)).sum(1)
    return sorted(np.argsort(-apart_T, kind="stable")[:most].tolist())


def by_task(use: Use) -> Figure:
    """What share of each task's weight goes to each adapter, beside all matrices."""
    tasks, adapters = shown_tasks(use, MOST_TASKS), shown_adapters(use)
    share_TE = use.share_TE[np.ix_(tasks, adapters)]
    height = 1.5 + 0.28 * len(tasks) + 0.06 * max(len(_cut(use.adapters[number])) for number in adapters)
    with figure(min(WIDTH, 2.6 + 0.55 * len(adapters)), float(np.clip(height, 2.2, 13))) as (made, axes):
        image = axes.imshow(share_TE, cmap=SEQUENTIAL, vmin=0, vmax=max(float(share_TE.max()), 1e-9), aspect="auto")
        _names_below(axes, [use.adapters[number] for number in adapters])
        axes.set_yticks(range(len(tasks)), [_cut(use.tasks[number]) for number in tasks])
        axes.set(title="Who serves a task", ylabel="task")
        if share_TE.size <= 240 and len(adapters) <= 14:
            for row, shares_E in enumerate(share_TE):
                for column, share in enumerate(shares_E):
                    if round(share, 2) > 0:
                        axes.text(column, row, f"{share:.0%}", ha="center", va="center", size=7.5, color=INK)
        made.colorbar(image, ax=axes, label="share of the task's weight", pad=0.02)
    return made


def by_matrix(use: Use) -> Figure:
    """The mean weight of each adapter beside each matrix, a panel for each task."""
    tasks, adapters = shown_tasks(use, MOST_PANELS), shown_adapters(use)
    weight_TME = use.weight_TME[np.ix_(tasks, range(len(use.matrices)), adapters)]
    most = max(float(np.nanmax(np.abs(weight_TME))), 1e-9) if np.isfinite(weight_TME).any() else 1.0
    rows = len(use.matrices)
    height = float(np.clip(1.6 + 0.16 * rows, 2.6, 9.5))
    with figure(WIDTH, height, ncols=len(tasks), sharey=True, squeeze=False) as (made, (panels,)):
        for axes, task, weight_ME in zip(panels, tasks, weight_TME, strict=True):
            image = axes.imshow(np.abs(weight_ME), cmap=SEQUENTIAL, vmin=0, vmax=most, aspect="auto")
            axes.set_title(_cut(use.tasks[task], 60 // len(tasks) + 4), weight="normal")
            _names_below(axes, [use.adapters[number] for number in adapters], small=True)
        step = max(1, -(-rows // MOST_LABELS))
        names = [_short(use.matrices[number]) for number in range(0, rows, step)]
        panels[0].set_yticks(range(0, rows, step), names, size=6.5 if rows > 16 else 8)
        panels[0].set_ylabel("matrix")
        made.suptitle("Who serves a task beside each matrix", x=0.01, ha="left", weight="bold", size=10.5)
        made.colorbar(image, ax=list(panels), label="mean weight", pad=0.01)
    return made


def _names_below(axes: Any, names: Sequence[str], *, small: bool = False) -> None:
    turn = 0 if sum(map(len, names)) <= 24 else 90
    axes.set_xticks(
        range(len(names)),
        [_cut(name) for name in names],
        rotation=turn,
        size=6.5 if small or len(names) > 16 else 8,
    )


def _cut(name: str, most: int = _LONG) -> str:
    plain = re.sub(r"[^\x20-\x7e\xa0-\uffff]", "?", name)
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


def _short(matrix: str) -> str:
    for long, short in _SHORT.items():
        matrix = matrix.replace(long, short)
    return _cut(matrix)


def explain_use(use: Use) -> list[str]:
    """What the numbers say, in sentences."""
    share_TE, said = use.share_TE, []
    for task in shown_tasks(use, MOST_PANELS):
        order_E = np.argsort(-share_TE[task], kind="stable")
        best = [
            f"{use.adapters[number]} ({percent(share_TE[task, number])})"
            for number in order_E[:3]
            if share_TE[task, number] >= 0.0005
        ]
        what = "nobody: nothing is added to its rows" if not best else ", ".join(best)
        said.append(f"{use.tasks[task]} is served by {what}.")
    if len(use.tasks) > 1:
        apart = 0.5 * np.abs(share_TE - share_TE.mean(0)).sum(1).mean()
        said.append(
            f"Tasks differ: {percent(float(apart))} of a task's weight is on other adapters than in the average of all tasks."
        )
    idle = [name for name, share in zip(use.adapters, share_TE.sum(0), strict=True) if share <= 0]
    if idle:
        said.append(f"No task uses {', '.join(idle[:6])}{' and others' if len(idle) > 6 else ''}.")
    return said


def write_use(use: Use, folder: str | Path, *, title: str, extra: Mapping[str, Any]) -> Path:
    """Write ``adapters.html``, its pictures as PNG, and ``adapters.json`` with the same facts into ``folder``; the page's path.

    Files of these names are replaced. Raises DataError if the folder cannot be written, CapacityError if the disk is full.
    """
    folder, sentences = Path(folder), explain_use(use)
    atomic_write_json(
        folder / "adapters.json", {"title": title, "extra": dict(extra), "text": sentences, **use.to_dict()}
    )
    sections = []
    for name, heading, how_to_read, picture in (
        (
            "tasks",
            "By task",
            "Of all weight that is given for a task, the share of each adapter; rows add up to 1.",
            by_task(use),
        ),
        (
            "matrices",
            "By matrix",
            "The mean weight of each adapter over the tokens of a task, beside each matrix; blank where it gets none, grey where "
            "the matrix has no such adapter. Of many tasks, those that differ most from the others.",
            by_matrix(use),
        ),
    ):
        save_picture(folder / f"{name}.png", to_png(picture))
        sections.append(Section(heading, how_to_read, to_svg(picture)))
    tiles = [
        (f"{len(use.matrices)} {TIMES} {len(use.adapters)}", f"matrices {TIMES} adapters"),
        (str(len(use.tasks)), "tasks"),
        (f"{sum(use.tokens_T):,}" if any(use.tokens_T) else DASH, "tokens looked at"),
    ]
    page = html(
        title,
        extra=extra,
        tiles=tiles,
        sentences=sentences,
        sections=sections,
        tables=[_table(use)],
        facts="adapters.json",
    )
    atomic_write_text(folder / "adapters.html", page)
    return folder / "adapters.html"


def _table(use: Use) -> Table:
    adapters = shown_adapters(use)
    columns = [
        Column("task", list(use.tasks), is_text=True),
        Column("tokens", [f"{number:,}" if number else DASH for number in use.tokens_T]),
    ]
    columns += [
        Column(_cut(use.adapters[number]), [f"{share:.3f}" for share in use.share_TE[:, number]]) for number in adapters
    ]
    return Table("Shares", "Of the weight of each task, beside all matrices.", columns)


def check_use_place(folder: str | Path) -> None:
    """Raise DataError where files of these names are there and of no such page, or the folder is a file."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file, and the page is a folder of files; choose another name")
    held = [folder / name for name in FILES if os.path.lexists(folder / name)]
    if held and not _is_use(folder / "adapters.json"):
        raise DataError(f"{held[0]} is there and of no such page, so it is not replaced; choose another folder")


def _is_use(path: Path) -> bool:
    try:
        facts = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and {"title", "extra", "text", "matrices", "shares"} <= facts.keys()
