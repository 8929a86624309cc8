"""Feature hashing: words, pairs of words and pieces of the words of a text fall into buckets with a sign. The same in every process.

Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", arXiv 0902.2206: the sign, drawn by the hash too, makes
collisions cancel on average.
"""
# Shapes: F different features of one text

import itertools
import re
import zlib

import numpy as np

__all__ = ["hashed_text"]

# Characters of a text for each word that may count: there are texts without spaces, and words that are no words.
LONGEST = 64

_WORD = re.compile(r"\w+")


def hashed_text(
    text: str, buckets: int, *, pairs: bool = True, pieces: int = 0, shortest: int = 1, max_words: int = 2048
) -> tuple[np.ndarray, np.ndarray]:
    """(bucket_F int64, count_F): where the features of ``text`` fall, and how often each occurs, with its sign.

    Args:
        text: any; what is no letter or digit parts words.
        buckets: D.
        pairs: pairs of neighbouring words too.
        pieces: runs of so many characters of each word, with a space before and behind it, too; 0 for none.
        shortest: characters of words that count as such and in pairs; pieces are of all words.
        max_words: words that count, the first; and of the text so many times `LONGEST` characters.
    """
    # Of a text of megabytes no more is looked at than may count: one call over all of it would hold Python's lock for as long.
    folded = text[: max_words * LONGEST].casefold()
    found = itertools.islice(_WORD.finditer(folded), max_words)
    words = [word[0].encode("utf-8", "surrogatepass") for word in found]
    long = words if shortest < 2 else [word for word in words if len(word.decode("utf-8", "surrogatepass")) >= shortest]
    hashes = [zlib.crc32(word) for word in long]
    if pairs:
        hashes += [zlib.crc32(b" " + second, first) for first, second in zip(hashes[:-1], long[1:], strict=True)]
    if pieces:
        # The byte in front, which no word has, keeps a piece apart from a word that is written like it.
        for word in words:
            run = f" {word.decode('utf-8', 'surrogatepass')} "
            starts = range(max(1, len(run) - pieces + 1))
            hashes += [zlib.crc32(b"\0" + run[at : at + pieces].encode("utf-8", "surrogatepass")) for at in starts]
    hash_F, count_F = np.unique(np.array(hashes, np.uint64), return_counts=True)
    # A CRC's low bits are not free of each other.
    mixed_F = (hash_F * np.uint64(0x9E3779B1)) & np.uint64(0xFFFFFFFF)
    sign_F = np.where(mixed_F >> np.uint64(31), 1.0, -1.0)
    bucket_F = ((mixed_F & np.uint64(0x7FFFFFFF)) * np.uint64(buckets)) >> np.uint64(31)
    return bucket_F.astype(np.int64), sign_F * count_F
