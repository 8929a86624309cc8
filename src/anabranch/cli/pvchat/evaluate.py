"""``anabranch pvchat eval``: how well a model knows a subject."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.options import AsJson, Seed
from anabranch.cli.output import fact, print_json
from anabranch.cli.pvchat.shared import ChatModel, Groups, Name, model_folder, print_score, read_groups, share
from anabranch.errors import DataError
from anabranch.extras import require


def evaluate(
    model: ChatModel,
    drawings: Annotated[
        Path,
        typer.Argument(
            metavar="DRAWINGS", help="New drawings of the subject and of other subjects: a folder or zip file."
        ),
    ],
    name: Name,
    subject: Annotated[
        str, typer.Option(metavar="SUBJECT", help="Folder with the drawings of the subject, e.g. Greek/character01.")
    ],
    without: Annotated[
        int | None,
        typer.Option(metavar="NUMBER", min=0, help="Number of the drawing it was learned from, which is left out."),
    ] = None,
    clips: Annotated[
        int,
        typer.Option(metavar="N", min=4, max=100_000, help="Number of clips; half of them do not show the subject."),
    ] = 64,
    groups: Groups = None,
    seed: Seed = 1,
    as_json: AsJson = False,
) -> None:
    """Ask a model about new clips, with and without the subject (half of the others look similar), and count the correct words.

    Example: anabranch pvchat eval runs/ab omniglot.zip --name '<Ab>' --subject Greek/character01 --without 0
    """
    require("lm", "images", "numba", by="anabranch pvchat eval", of="graph")
    import torch

    from anabranch.heads.pvchat import PVChat, Subject, exam, measure, portraits, read_drawings

    chat = PVChat.load(model_folder(model))
    subjects = read_drawings(drawings, groups=read_groups(groups))
    known = next((each for each in subjects if each.name == subject), None)
    if known is None:
        raise DataError(
            f"{drawings} has no subject {subject!r}; it has {', '.join(each.name for each in subjects[:3])}, ..."
        )
    rows = [number for number in range(len(known.ink_NSS)) if number != without]
    if not rows:
        raise DataError(f"{subject} has one drawing, which it was learned from; give others")
    shown = Subject(known.name, known.ink_NSS[torch.tensor(rows)])
    questions = exam(chat, name, shown, portraits(subjects), clips=clips, seed=seed)
    score = measure(chat, questions)
    if as_json:
        print_json({"name": name, "subject": subject, "clips": clips, **score.to_dict()})
        return
    fact("subject", f"{name}   {subject}, {len(rows)} drawings, {clips} clips")
    print_score(score)
    fact(
        "is it",
        f"there: {share(score.balanced)} balanced accuracy (chance 0.5), {share(score.yes_share)} of the answers are yes",
    )
