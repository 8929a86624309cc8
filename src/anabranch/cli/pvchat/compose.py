"""``anabranch pvchat compose``: clips of drawings, to ask about."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from anabranch.cli.options import AsJson, Seed
from anabranch.cli.output import print_json, shell_word, wrote
from anabranch.cli.pvchat.shared import Drawings, Groups, read_groups
from anabranch.errors import DataError
from anabranch.extras import require
from anabranch.files import atomic_folder, check_apart

TRUTH = "clips.jsonl"
# Of the description of as many clips as there may be.
_MOST_BYTES = 64 << 20


def compose(
    drawings: Drawings,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the clips.")],
    subject: Annotated[
        str | None,
        typer.Option(metavar="SUBJECT", help="Subject of every clip, e.g. Greek/character01. Default: any."),
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="Number of clips.")] = 8,
    frames: Annotated[int, typer.Option(metavar="F", min=1, max=64, help="Frames per clip.")] = 8,
    size: Annotated[int, typer.Option(metavar="PIXELS", min=16, max=512, help="Width and height of a frame.")] = 48,
    kind: Annotated[
        Literal["gif", "webp"], typer.Option(metavar="KIND", help="gif, or webp, which is lossless.")
    ] = "webp",
    groups: Groups = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Make clips in which drawn subjects move over a background; clips.jsonl describes what they show.

    Example: anabranch pvchat compose drawings --subject cat --out clips && anabranch pvchat ask runs/cat clips/0000.webp "where is <cat>
    ?"
    """
    require("lm", "images", by="anabranch pvchat compose")
    import torch

    from anabranch.heads.pvchat import Composed, Composer, portraits, read_drawings, write_clip

    check_apart([out], [drawings])
    subjects = read_drawings(drawings, groups=read_groups(groups))
    named = {each.name: each for each in subjects}
    if subject is not None and subject not in named:
        raise DataError(f"{drawings} has no subject {subject!r}; it has {', '.join(list(named)[:3])}, ...")
    generator = torch.Generator().manual_seed(seed)
    made = Composed(Composer(Composer.Config(frames=frames, size=size)), portraits(subjects))
    lines: list[dict[str, Any]] = []
    with atomic_folder(out, replacing=_made_here(out)) as folder:
        for number in range(count):
            chosen = named[subject] if subject else subjects[int(torch.randint(len(subjects), (), generator=generator))]
            drawing = int(torch.randint(len(chosen.ink_NSS), (), generator=generator))
            clip = made.clips([chosen.portrait(drawing)], 1, generator)[0]
            file = f"{number:04}.{kind}"
            write_clip(folder / file, clip, scale=max(1, min(4, 192 // size)))
            lines.append({"file": file, "actors": [vars(actor) for actor in clip.actors]})
        (folder / TRUTH).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if as_json:
        print_json({"folder": str(out), "clips": lines})
        return
    wrote(
        f"{out}   {count} clips, {TRUTH}",
        f"anabranch pvchat ask MODEL {shell_word(out / lines[0]['file'])} 'where is <NAME> ?'",
    )


def _made_here(folder: Path) -> str:
    """Which names of a folder may be replaced: those of the clips that its own description tells of, and of that; else none.

    By their names alone, numbers with an ending, they could be anybody's pictures.
    """
    truth = folder / TRUTH
    try:
        if not truth.is_file() or truth.stat().st_size > _MOST_BYTES:
            return ""
        lines = [json.loads(line) for line in truth.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        return ""
    if not all(isinstance(line, dict) and line.keys() == {"file", "actors"} for line in lines):
        return ""
    return "|".join(re.escape(name) for name in (TRUTH, *(str(line["file"]) for line in lines)))
