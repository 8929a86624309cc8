"""``anabranch pvchat ask``: a question about a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.options import AsJson
from anabranch.cli.output import print_json, print_line, say
from anabranch.cli.pvchat.shared import ChatModel, model_folder
from anabranch.extras import require


def ask(
    model: ChatModel,
    clip: Annotated[
        Path,
        typer.Argument(metavar="CLIP", help="An animation (.gif, .webp), a picture, or a folder of frames."),
    ],
    questions: Annotated[
        list[str],
        typer.Argument(metavar="QUESTION...", help="Questions that name the subject, e.g. 'where is <Ab> ?'."),
    ],
    as_json: AsJson = False,
) -> None:
    """Ask about a clip: whether a subject is in it, what it looks like, what it does, where it is.

    Example: anabranch pvchat ask runs/cat clip.gif 'is <cat> in the video ?' 'where is <cat> ?'
    """
    require("lm", "images", by="anabranch pvchat ask")
    from anabranch.heads.pvchat import PVChat, read_clip

    chat = PVChat.load(model_folder(model))
    seen = read_clip(clip, most_frames=chat.config.frames)
    unknown = {question: chat.vocabulary.unknown(question) for question in questions}
    answers = [chat.ask(seen, question) for question in questions]
    for question, words in unknown.items():
        if words:
            say(f"warning: the model does not know {', '.join(map(repr, words))} in {question!r}")
    if as_json:
        asked = [{"question": question, "answer": answer} for question, answer in zip(questions, answers, strict=True)]
        print_json({"clip": str(clip), "frames": len(seen.frame_FCHW), "answers": asked})
        return
    for answer in answers:
        print_line(answer)
