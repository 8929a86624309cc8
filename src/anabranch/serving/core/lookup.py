"""Prompt lookup: what may come next in a text, guessed from what came before where its last tokens stood earlier.

A guess costs nothing but the row that checks it: the model computes all guessed tokens in one step, as it does a prompt's, and those are
kept that it would have chosen itself. What repeats (code that is edited, a quoted document, JSON, a loop) then takes a few steps instead
of one for each token.

Sources: prompt lookup decoding (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding) for the guess; speculative decoding (Leviathan
et al., ICML 2023) for checking several tokens at once.
"""

from array import array
from collections.abc import Sequence

# Earlier places of the last token that are looked at, the newest first: what a guess costs has a bound, however long the text is.
MOST_PLACES = 256


class PromptLookup:
    """Guesses for one text that grows, its prompt and its output.

    The guess is what followed where the longest end of the text, of at most ``ngram`` tokens, stood before; of several such places the
    newest. Where that comes to the text's end it goes on with the guess itself, so a loop is guessed for as long as is asked for.

    Args:
        ngram: tokens of the longest end that is looked for; one is the least.
        most: tokens of a guess. A text of whose guess not half were right is given half as many, at least one, and one whose guesses are
            all right twice as many again: so it comes to a size of which at least half holds.
    """

    __slots__ = ("_before", "_last", "_most", "_ngram", "_size")

    def __init__(self, ngram: int, most: int) -> None:
        self._ngram, self._most, self._size = ngram, most, most
        # The newest place of each token, and of each place the one before it with the same token; -1 for none.
        self._last: dict[int, int] = {}
        self._before = array("q")

    def guess(self, tokens: Sequence[int], length: int, most: int) -> list[int]:
        """At most ``most`` tokens that may follow the first ``length`` of ``tokens``; none where nothing stood before.

        ``tokens`` begin with those of the calls before, and the length never falls.
        """
        self.read(tokens, length)
        most = min(most, self._size)
        at = self._find(tokens, length - 1) if most > 0 else -1
        if at < 0:
            return []
        known = list(tokens[at + 1 : min(length, at + 1 + most)])
        period = length - 1 - at
        while len(known) < most:
            known.append(known[len(known) - period])
        return known

    def learn(self, guessed: int, right: int) -> None:
        """Of ``guessed`` tokens so many were right."""
        if right == guessed:
            # One that was cut short says nothing of longer ones.
            self._size = min(max(2 * guessed, self._size), self._most)
        elif 2 * right < guessed:
            self._size = max(self._size // 2, 1)

    def missing(self, length: int) -> int:
        """Places of the first ``length`` tokens that are still to be read."""
        return max(0, length - len(self._before))

    def read(self, tokens: Sequence[int], length: int) -> None:
        """Note the places of the first ``length`` of ``tokens``, which begin with those of the calls before."""
        last, before = self._last, self._before
        for place in range(len(before), length):
            token = tokens[place]
            before.append(last.get(token, -1))
            last[token] = place

    def _find(self, tokens: Sequence[int], end: int) -> int:
        """Where the longest end of the text up to ``end`` ends before it; -1 for nowhere."""
        best, found = 0, -1
        place = self._before[end]
        for _ in range(MOST_PLACES):
            if place < 0:
                break
            count = 1
            while count < self._ngram and place >= count and tokens[place - count] == tokens[end - count]:
                count += 1
            if count > best:
                best, found = count, place
                if best == self._ngram:
                    break
            place = self._before[place]
        return found
