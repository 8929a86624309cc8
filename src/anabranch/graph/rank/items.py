"""Items with metadata, how a term matches one, and a made-up library of the shape of the paper's."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import InputError

Id = int | str
TEXT_LIMIT, ID_LIMIT, TAGS_LIMIT = 512, 128, 32


@dataclass(frozen=True, slots=True)
class Item:
    """What can be searched for.

    Attributes:
        id: an integer, or text of at most 128 characters; equal scores are ordered by it (integers before text).
        title: at most 512 characters, as are artist and each tag.
        artist: or author, maker, provider.
        tags: at most 32.
    """

    id: Id
    title: str = ""
    artist: str = ""
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = fault_of_item(self.id, self.title, self.artist, self.tags)
        if wrong:
            raise InputError(f"item {self.id!r}: {wrong}")


def fault_of_item(id: object, title: object, artist: object, tags: object) -> str | None:
    """What is wrong with these fields; None if nothing is."""
    if isinstance(id, bool) or not isinstance(id, int | str) or id == "":
        return "an id is an integer or a text that is not empty"
    if (isinstance(id, str) and len(id) > ID_LIMIT) or (isinstance(id, int) and not -(2**53) < id < 2**53):
        return f"an id is an integer below 2**53 or a text of at most {ID_LIMIT} characters"
    if not isinstance(tags, tuple) or len(tags) > TAGS_LIMIT:
        return f"tags are a tuple of at most {TAGS_LIMIT} texts"
    if not all(isinstance(text, str) and len(text) <= TEXT_LIMIT for text in (title, artist, *tags)):
        return f"title, artist and tags are texts of at most {TEXT_LIMIT} characters"
    return None


def order_of(id: Id) -> tuple[bool, Id]:
    """The sort key of ids: integers by value, then texts."""
    return isinstance(id, str), id


def normalize(term: str) -> str:
    """A term in lower case, with single spaces and none at its ends. Raises InputError for one that is empty, too long or no text."""
    if not isinstance(term, str):
        raise InputError(f"a term is a text, not {type(term).__name__}")
    found = " ".join(term.lower().split())
    if not found or len(found) > TEXT_LIMIT:
        raise InputError(f"a term has 1 to {TEXT_LIMIT} characters, this one has {len(found)}")
    return found


def matches(term: str, item: Item) -> bool:
    """Whether a normalised term is one of the item's tags, or stands as whole words in its title or artist."""
    if any(" ".join(tag.lower().split()) == term for tag in item.tags):
        return True
    return any(f" {term} " in f" {' '.join(text.lower().split())} " for text in (item.title, item.artist) if text)


def by_id(items: Iterable[Item]) -> dict[Id, Item]:
    """Items by id. Raises InputError for something else, or for two items of one id."""
    found: dict[Id, Item] = {}
    if not np.iterable(items):
        raise InputError(f"items is {shown(items)}; it must be a list of `Item`s")
    for item in items:
        if not isinstance(item, Item):
            raise InputError(f"a library holds `Item`s, not {type(item).__name__}")
        if found.setdefault(item.id, item) != item:
            raise InputError(f"two items have the id {item.id!r}")
    return found


def library(
    num_items: int = 256, num_tags: int = 39, tags_per_item: int = 3, *, low: int = 10, high: int = 28, seed: int = 0
) -> list[Item]:
    """Made-up items in which each has ``tags_per_item`` tags and each tag ``low`` to ``high`` items: the shape of the paper's table.

    Raises InputError if no such table exists.
    """
    total = num_items * tags_per_item
    high = min(high, num_items)
    if not (0 < tags_per_item <= num_tags and low * num_tags <= total <= high * num_tags):
        raise InputError(
            f"{num_items} items with {tags_per_item} tags each do not give {num_tags} tags {low} to {high} items each"
        )
    generator = np.random.default_rng(seed)
    size_T = np.clip(generator.normal(total / num_tags, (high - low) / 4, num_tags).round(), low, high).astype(int)
    while (off := total - size_T.sum()) != 0:
        free = np.flatnonzero(size_T < high if off > 0 else size_T > low)
        size_T[generator.choice(free)] += np.sign(off)
    has_IT = np.zeros((num_items, num_tags), bool)
    # Always into the items with most places left: never a dead end.
    for tag in np.argsort(-size_T, kind="stable"):
        taken_I = has_IT.sum(1) + generator.random(num_items)
        has_IT[np.argsort(taken_I)[: size_T[tag]], tag] = True
    # That avoids pairs of tags; exchanges make them as frequent as chance does.
    for _ in range(8 * num_items):
        first, second = generator.integers(num_items, size=2)
        gives, takes = (np.flatnonzero(has_IT[a] & ~has_IT[b]) for a, b in ((first, second), (second, first)))
        if len(gives) and len(takes):
            swap = [gives[generator.integers(len(gives))], takes[generator.integers(len(takes))]]
            has_IT[first, swap], has_IT[second, swap] = [False, True], [True, False]
    return [
        Item(number, f"Title {number}", f"Artist {number % 97}", tuple(f"tag-{tag:02}" for tag in np.flatnonzero(row)))
        for number, row in enumerate(has_IT)
    ]
