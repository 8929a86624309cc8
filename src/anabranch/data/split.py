"""Which documents train and which validate.

A document goes where the stable hash of its key sends it, so that adding or removing others never moves it. A label with too
few documents for that (one long book, say) is cut inside: the end of every stretch of a mebibyte validates.
"""

from collections.abc import Iterable, Iterator

from anabranch.data.corpus import Document
from anabranch.data.reading import stable_hash

TRAIN, VALIDATION = "train", "validation"

# Characters; also the most that is tokenised in one go.
STRETCH = 1 << 20


def split_of(key: str, fraction: float) -> str:
    """``validation`` for about ``fraction`` of all keys, else ``train``."""
    return VALIDATION if stable_hash(key) < fraction * 2**64 else TRAIN


def labels_cut_inside(documents: Iterable[Document], fraction: float) -> set[str]:
    """The labels whose documents cannot be split whole: fewer than 1 / fraction of them, or one side left empty."""
    sides: dict[str, list[int]] = {}
    for document in documents:
        count = sides.setdefault(document.label, [0, 0])
        count[split_of(document.key, fraction) == VALIDATION] += 1
    if fraction == 0:
        return set()
    return {
        label
        for label, (train, validation) in sides.items()
        if (train + validation) * fraction < 1 or not (train and validation)
    }


def split(documents: Iterable[Document], fraction: float, cut_inside: set[str]) -> Iterator[tuple[str, Document]]:
    """Each document, or the parts of it, with the split it belongs to. The parts joined are the documents."""
    for document in documents:
        if document.label not in cut_inside:
            yield split_of(document.key, fraction), document
            continue
        for stretch in stretches(document.text):
            end = _line_end(stretch, round(len(stretch) * (1 - fraction)))
            for side, text in ((TRAIN, stretch[:end]), (VALIDATION, stretch[end:])):
                if text:
                    yield side, Document(document.key, text, document.label)


def stretches(text: str) -> Iterator[str]:
    """``text`` in pieces of at most a mebibyte of characters, cut at line ends where there are any."""
    while len(text) > STRETCH:
        end = _line_end(text, STRETCH)
        yield text[:end]
        text = text[end:]
    yield text


def _line_end(text: str, position: int) -> int:
    """The last place up to ``position`` after a line end with no other blank beside it, else any line end, else ``position``.

    Cutting at the first sort of place changes no token of a byte-level tokenizer: GPT-2's pattern always cuts there.
    """
    end = position
    while (end := text.rfind("\n", position // 2, end)) >= 0:
        if not (text[end - 1 : end].isspace() or text[end + 1 : end + 2].isspace()):
            return end + 1
    return text.rfind("\n", position // 2, position) + 1 or position
