"""``anabranch heads transcribe``: what is said in files of sound."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import AsJson, Device, Quiet
from anabranch.cli.output import print_json, say, visible
from anabranch.errors import CheckpointError
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.heads.whisper import Piece


def transcribe(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Whisper folder, of transformers or CTranslate2, or a run of heads train.",
            show_default=False,
        ),
    ],
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="WAV files, or folders of them.", show_default=False),
    ],
    language: Annotated[
        str, typer.Option(metavar="CODE", help="What is spoken, for a Whisper of several languages.")
    ] = "en",
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write down what is said in files of sound, with a Whisper whose heads may be routed.

    In folders, WAV files are read (.wav, .WAV); other sound is named and left out. Sound longer than the model hears at once (30 s) is cut
    where it is quietest. Pieces in which nobody speaks stay empty. --json also gives where each piece starts and ends, how likely nobody
    speaks in it, and what was left out.

    Example: anabranch heads transcribe whisper-tiny talk.wav
    """
    require("huggingface", by="anabranch heads transcribe")
    from anabranch.cli.options import read_device
    from anabranch.cli.progress import Progress
    from anabranch.heads.whisper import is_whisper, open_whisper, read_sound, transcribe_sound
    from anabranch.heads.whisper.sound import RATE, told_unread, unread_in

    if not is_whisper(model):
        raise CheckpointError(f"{model} holds no Whisper; speech is written down by one")
    found = _found(files)
    unread = [path for place in files if place.is_dir() for path in unread_in(place)]
    if unread:
        say(visible(told_unread(unread)))
    network, words = open_whisper(model, language)
    network.to(read_device(device))
    told: list[dict[str, Any]] = []
    for path in found:
        sound_T = read_sound(path)
        # Of each file, so that its text stands there when the next one begins.
        with Progress(math.ceil(len(sound_T) / RATE), "second", quiet=quiet) as progress:

            def begin(start_s: float, path: Path = path, progress: Progress = progress) -> None:
                progress.update(int(start_s), visible(path.name))

            told.append(_told(path, transcribe_sound(network, words, sound_T, begin=begin)))
        if not as_json:
            text = " ".join(visible(told[-1]["text"]).split())
            print(visible(text if len(found) == 1 else f"{path}\t{text}"), flush=True)
    if as_json:
        print_json({"model": model, "files": told, "unread": [str(path) for path in unread]})


def _found(files: list[Path]) -> list[Path]:
    """The files, and those in folders by their paths. Raises DataError for what cannot be read, before anything is heard."""
    from anabranch.heads.whisper.sound import check_sound, sounds_in

    made: list[Path] = []
    for path in files:
        made += sounds_in(path) if path.is_dir() else [path]
    for path in made:
        check_sound(path)
    return made


def _told(path: Path, pieces: list[Piece]) -> dict[str, Any]:
    """Of a file, for --json."""
    return {
        "file": str(path),
        "seconds": pieces[-1].end_s,
        "text": " ".join(piece.text for piece in pieces if piece.text),
        "pieces": [
            {"start_s": piece.start_s, "end_s": piece.end_s, "text": piece.text, "no_speech_probability": piece.silence}
            for piece in pieces
        ],
    }
