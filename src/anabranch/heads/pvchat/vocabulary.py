"""The words that a model knows, and the names of subjects, to which more can be added.

Words are numbered as they came; a name that is added stands behind all others, so no number changes.
"""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.errors import ConfigError, InputError
from anabranch.heads.pvchat.questions import check_name, split_words, words

__all__ = ["END", "PAD", "UNKNOWN", "Vocabulary"]

PAD, UNKNOWN, END = 0, 1, 2
_MARKS = ("(pad)", "(unknown)", "(end)")


class Vocabulary:
    """Words to numbers and back.

    Args:
        names: of subjects, in the order in which they were added.
        known: other words; None for those of questions and answers.

    Attributes:
        names: likewise, each with its number as a subject.
    """

    def __init__(self, names: Sequence[str] = (), known: Sequence[str] | None = None) -> None:
        self.words = list(words() if known is None else known)
        self._texts = [*_MARKS, *self.words]
        self._id_of = {text: number for number, text in enumerate(self._texts)}
        if len(self._id_of) != len(self._texts):
            raise ConfigError("a word stands twice in the vocabulary; each must be there once")
        self.names: list[str] = []
        for name in names:
            self.add(name)

    def __len__(self) -> int:
        return len(self._texts)

    def check_new(self, name: str) -> None:
        """Raise ConfigError for what is no name, or is in the vocabulary already."""
        if check_name(name) in self._id_of:
            raise ConfigError(
                f"name is {name!r}, which is in the vocabulary already; choose another, or ask about the one that is there"
            )

    def add(self, name: str) -> int:
        """Take up the name of a new subject; returns its number as a word. Raises ConfigError as `check_new`."""
        self.check_new(name)
        self._id_of[name] = len(self._texts)
        self._texts.append(name)
        self.names.append(name)
        return self._id_of[name]

    def drop(self, count: int) -> None:
        """Take the last ``count`` names off again; no other number changes."""
        for name in self.names[len(self.names) - count :]:
            del self._id_of[name]
            self._texts.remove(name)
            self.names.remove(name)

    def subject(self, name: str) -> int:
        """The number of a name as a subject. Raises InputError for one that is not known."""
        if name not in self.names:
            known = ", ".join(self.names[-5:][::-1])
            more = ", ..." if len(self.names) > 5 else ""
            raise InputError(
                f"no subject is named {name!r}; {f'known: {known}{more}' if known else 'none is known yet'}"
            )
        return self.names.index(name)

    def word(self, name: str) -> int:
        """The number of a name as a word. Raises InputError for one that is not known."""
        self.subject(name)
        return self._id_of[name]

    def subjects_in(self, text: str) -> list[int]:
        """The numbers of the subjects that a text names, each once, in order. Raises InputError for a name that is not known."""
        named = [word for word in split_words(text) if word.startswith("<")]
        return list(dict.fromkeys(self.subject(name) for name in named))

    def unknown(self, text: str) -> list[str]:
        """The words of a text that the model does not know."""
        return [word for word in split_words(text) if word not in self._id_of]

    def encode(self, text: str) -> list[int]:
        """The numbers of the words of a text; `UNKNOWN` for others."""
        return [self._id_of.get(word, UNKNOWN) for word in split_words(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of numbers, up to the end of the answer."""
        ids = list(ids)
        kept = ids[: ids.index(END)] if END in ids else ids
        return " ".join(self._texts[number] for number in kept if number != PAD)
