"""The language a router speaks: thoughts, questions to models, what they said, and an answer, each between tags.

    <think>...</think>   <search>NAME: question</search>   <information>...</information>   <answer>...</answer>

``route`` is another word for ``search``. Information is written by the environment alone: what a model said is escaped before it stands
there, so that no model's words end an episode, or begin a question.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

TAGS = ("think", "search", "information", "answer")
# Words that prompts show where a name and a question belong.
PLACEHOLDERS = ("llm-name", "your-query")

_ANY = re.compile(r"<(\s*+/?+\s*+(?:think|search|route|information|answer)\b)", re.IGNORECASE)
_MARK = re.compile(r"<(/?)(think|search|information|answer)>")
# Words, and numbers with their decimals.
_WHOLE = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")
# How names of signs begin in scripts without spaces.
_UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ")


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of an episode.

    Attributes:
        text: what the router answers.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Route:
    """A question to a model.

    Attributes:
        name: as the router wrote it.
        query: the question.
    """

    name: str
    query: str


@dataclass(frozen=True, slots=True)
class Invalid:
    """No action that can be done.

    Attributes:
        reason: in a few words.
    """

    reason: str


Action = Answer | Route | Invalid


def contents(text: str, tag: str) -> Iterator[tuple[int, str]]:
    """Where each pair of a tag begins, and what stands in it; in time linear in the text."""
    opening, ending, at = f"<{tag}>", f"</{tag}>", 0
    while (start := text.find(opening, at)) >= 0:
        begin = start + len(opening)
        end = text.find(ending, begin)
        if end < 0:
            return
        yield start, text[begin:end]
        at = end + len(ending)


def plain_tags(text: str) -> str:
    """``<route>`` written as ``<search>``."""
    return text.replace("<route>", "<search>").replace("</route>", "</search>")


def cut(text: str) -> str:
    """A turn up to its first question's end, else its first answer's; all of it where neither ends."""
    for end in ("</search>", "</answer>"):
        before, found, _ = text.partition(end)
        if found:
            return before + found
    return text


def closed(text: str) -> str:
    """A turn that an endpoint stopped at an end tag, which it does not give back, with that tag.

    The one whose beginning came last and has no end; nothing is added where none has.
    """
    starts = {tag: text.rfind(f"<{tag}>") for tag in ("search", "answer")}
    tag = max(starts, key=lambda one: starts[one])
    start = starts[tag]
    return text if start < 0 or f"</{tag}>" in text[start:] else f"{text}</{tag}>"


def answered(text: str) -> str:
    """A turn that was cut within its answer, with that answer's end, in place of what there was of the tag; others as they are."""
    if action_of(text) != Invalid("no action"):
        return text
    kept = next(
        (text[:-size] for size in range(len("</answer>") - 1, 1, -1) if text.endswith("</answer>"[:size])), text
    )
    whole = closed(kept)
    return whole if isinstance(action_of(whole), Answer) else text


def action_of(text: str) -> Action:
    """The first thing a turn does. A question is split at its first colon; whatever colons it has itself stay."""
    first = min(
        ((start, tag, said) for tag in ("search", "answer") for start, said in contents(text, tag)), default=None
    )
    if first is None:
        return Invalid("no action")
    _, tag, said = first
    if tag == "answer":
        return Answer(said.strip())
    name, colon, query = said.partition(":")
    name, query = name.strip(), query.strip()
    if any(one in said.casefold() for one in PLACEHOLDERS):
        return Invalid("a placeholder")
    if not colon or not name:
        return Invalid("no name and colon")
    return Route(name, query) if query else Invalid("no question")


def escaped(text: str) -> str:
    """What a model said, with every tag of ours in it, however it is written, made plain text."""
    return _ANY.sub(r"&lt;\1", text)


def information(text: str) -> str:
    """What the environment writes after a question."""
    return f"\n\n<information>{escaped(text)}</information>\n\n"


def last_answer(text: str) -> str | None:
    """What the last answer says; None without one."""
    return next((said.strip() for _, said in reversed(list(contents(text, "answer")))), None)


def resolve(name: str, models: Sequence[str], aliases: Mapping[str, str] | None = None) -> str | None:
    """The model that a router means: the very name, the name in any case, an alias, else the one model that has it in its name.

    It has it there as whole words and numbers, of two letters or digits at least: ``mixtral`` and ``8x22b`` are of ``mixtral-8x22b``, and
    ``m1`` is not of ``m12`` or ``m1.5``. Words of scripts that put no spaces between them may begin and end anywhere. None where that is
    none, or several.
    """
    if name in models:
        return name
    folded = name.casefold().strip()
    if not folded:
        return None
    same = [model for model in models if model.casefold() == folded]
    if same:
        return same[0] if len(same) == 1 else None
    named = {model for alias, model in (aliases or {}).items() if alias.casefold() == folded and model in models}
    if named:
        return named.pop() if len(named) == 1 else None
    if sum(sign.isalnum() for sign in folded) < 2:
        return None
    within = [model for model in models if _has_part(model.casefold(), folded)]
    return within[0] if len(within) == 1 else None


def _has_part(name: str, part: str) -> bool:
    """Whether a name has a part that begins and ends in the middle of no word and of no number of it."""
    within = {at for whole in _WHOLE.finditer(name) for at in range(whole.start() + 1, whole.end())}
    # In scripts that put no spaces between words nobody sees where one begins.
    within -= {at for at in within if _is_unspaced(name[at - 1]) or _is_unspaced(name[at])}
    starts = (start for start in range(len(name)) if name.startswith(part, start))
    return any(start not in within and start + len(part) not in within for start in starts)


def _is_unspaced(sign: str) -> bool:
    return unicodedata.name(sign, "").startswith(_UNSPACED)


def faults(
    text: str, models: Sequence[str], aliases: Mapping[str, str] | None = None, *, one_colon: bool = True
) -> tuple[str, ...]:
    """Rules of the format that a whole trajectory breaks, by short names; none where it is well made.

    Args:
        text: of the router and the environment, without the prompt.
        models, aliases: that may be asked, see `resolve`.
        one_colon: a question with more colons than one is a fault (code); without it they may have more.
    """
    text = plain_tags(text)
    found: list[str] = []
    counts = {tag: (text.count(f"<{tag}>"), text.count(f"</{tag}>")) for tag in TAGS}
    if not any(min(pair) for pair in counts.values()):
        found.append("no tags")
    if any(opened != ended for opened, ended in counts.values()):
        found.append("unbalanced")
    if _is_nested(text):
        found.append("nested")
    thoughts = [said for _, said in contents(text, "think")]
    if not thoughts:
        found.append("no thought")
    if any(thought.strip() in ("", "...") for thought in thoughts):
        found.append("empty thought")
    if counts["answer"][0] != 1:
        found.append("not one answer")
    if counts["search"][0] != counts["information"][0]:
        found.append("questions and information differ")
    if not text.lstrip().startswith("<think>"):
        found.append("does not begin with a thought")
    if not text.rstrip().endswith("</answer>"):
        found.append("does not end with an answer")
    for _, question in contents(text, "search"):
        found += _question_faults(question, models, aliases, one_colon)
    return tuple(dict.fromkeys(found))


def _question_faults(
    question: str, models: Sequence[str], aliases: Mapping[str, str] | None, one_colon: bool
) -> list[str]:
    name, colon, query = (part.strip() for part in question.partition(":"))
    if not colon or (one_colon and ":" in query):
        return ["not one colon"]
    found = []
    if not query or any(one in question.casefold() for one in PLACEHOLDERS):
        found.append("no question")
    if name and name.casefold() in query.casefold():
        found.append("the name in the question")
    if resolve(name, models, aliases) is None:
        found.append("unknown model")
    return found


def _is_nested(text: str) -> bool:
    """Whether a tag begins before the one before has ended, or ends what did not begin."""
    open_tag: str | None = None
    for mark in _MARK.finditer(text):
        if not mark[1]:
            if open_tag is not None:
                return True
            open_tag = mark[2]
        elif open_tag != mark[2]:
            return True
        else:
            open_tag = None
    return False
