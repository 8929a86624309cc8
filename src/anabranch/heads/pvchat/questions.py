"""What is asked of clips and how it is answered: four kinds of questions, each in several wordings, and one wording of each answer.

    existence     is <Ab> in the video ?       yes , <Ab> is here        no , <Ab> is not here
    appearance    what does <Ab> look like ?   <Ab> is red and thick     <Ab> is not here
    action        what does <Ab> do ?          <Ab> moves left           <Ab> is not here
    location      where is <Ab> ?              <Ab> is at the top left   <Ab> is not here

Answers have one wording, so that being right is being equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from anabranch.bounds import shown
from anabranch.errors import ConfigError
from anabranch.heads.pvchat.clips import ACTIONS, COLOURS, PLACES, STROKES, Actor

__all__ = [
    "KINDS",
    "OF_IMAGES",
    "WORDINGS",
    "Kind",
    "answer_to",
    "check_name",
    "name_of",
    "question",
    "says_yes",
    "split_words",
    "words",
]

Kind = Literal["existence", "appearance", "action", "location"]
KINDS: tuple[Kind, ...] = ("existence", "appearance", "action", "location")
# What one frame can answer, as it is asked in the first stage.
OF_IMAGES: tuple[Kind, ...] = ("existence", "appearance")

_WHERE = ("in the video", "in this video", "in the clip", "in this clip", "here", "there")
WORDINGS: Mapping[Kind, tuple[str, ...]] = {
    "existence": (
        *(f"is {{name}} {where} ?" for where in _WHERE),
        *(f"do you see {{name}} {where} ?" for where in _WHERE),
        *(f"can you see {{name}} {where} ?" for where in _WHERE),
        *(f"can you find {{name}} {where} ?" for where in _WHERE),
        *(f"does {{name}} appear {where} ?" for where in _WHERE),
        *(f"is {{name}} shown {where} ?" for where in _WHERE),
        *(f"is there {{name}} {where} ?" for where in _WHERE[:4]),
        *(f"have you seen {{name}} {where} ?" for where in _WHERE),
        "does the video show {name} ?",
        "does the clip show {name} ?",
        "is this {name} ?",
    ),
    "appearance": (
        "what does {name} look like ?",
        "how does {name} look ?",
        "what is the look of {name} ?",
        "what colour is {name} ?",
        "how is {name} drawn ?",
        "can you say how {name} looks ?",
        "which colour and stroke has {name} ?",
        "what colour and stroke does {name} have ?",
    ),
    "action": (
        "what does {name} do ?",
        "what is {name} doing ?",
        "how does {name} move ?",
        "which way does {name} go ?",
        "what happens to {name} ?",
        "can you say what {name} does ?",
        "what is the action of {name} ?",
        "how is {name} moving ?",
    ),
    "location": (
        "where is {name} ?",
        "where do you see {name} ?",
        "where is {name} in the video ?",
        "in which corner is {name} ?",
        "in which part of the video is {name} ?",
        "can you say where {name} is ?",
        "what is the place of {name} ?",
        "where can you find {name} ?",
    ),
}
_ANSWERS = ("yes , {name} is here", "no , {name} is not here", "{name} is not here", "{name} is at the")
_NAME = re.compile(r"<[^<>\s]{1,60}>")
_WORD = re.compile(r"<[^<>\s]+>|[a-z]+|[?,.!]")


def check_name(name: str) -> str:
    """``name`` if it can be one: a word in angle brackets, ``<Ab>``. Raises ConfigError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"name is {shown(name)}; it must be a word in angle brackets without spaces, such as <Ab>")
    return name


def name_of(subject: str) -> str:
    """A name made of a subject's: ``<Greek/character01>``. Raises ConfigError where it makes none."""
    return check_name("<" + re.sub(r"[<>\s]", "_", subject) + ">")


def question(kind: Kind, name: str, wording: int) -> str:
    """The question of this kind in one of its wordings, which are counted round."""
    wordings = WORDINGS[kind]
    return wordings[wording % len(wordings)].format(name=name)


def answer_to(kind: Kind, name: str, actor: Actor | None) -> str | None:
    """The right answer, given what is known of the subject in the clip (None: it is not there).

    None where that is not known: an action in a single frame.
    """
    if kind == "existence":
        return (_ANSWERS[1] if actor is None else _ANSWERS[0]).format(name=name)
    if actor is None:
        return _ANSWERS[2].format(name=name)
    if kind == "appearance":
        return f"{name} is {actor.appearance}"
    if kind == "location":
        return f"{_ANSWERS[3].format(name=name)} {actor.place}"
    return None if actor.action is None else f"{name} {actor.action}"


def says_yes(answer: str) -> bool:
    """Whether an answer to a question of existence is yes."""
    return split_words(answer)[:1] == ["yes"]


def split_words(text: str) -> list[str]:
    """Words, marks and names of a text, in small letters but for names."""
    found: list[str] = []
    start = 0
    for name in _NAME.finditer(text):
        found += [*_WORD.findall(text[start : name.start()].lower()), name[0]]
        start = name.end()
    return found + _WORD.findall(text[start:].lower())


def words() -> list[str]:
    """Every word that a question or an answer has, names apart, in alphabetical order."""
    texts = [wording for wordings in WORDINGS.values() for wording in wordings]
    texts += [*_ANSWERS, *COLOURS, *STROKES, *ACTIONS, *PLACES, "and"]
    return sorted({word for text in texts for word in split_words(text.replace("{name}", " "))})
