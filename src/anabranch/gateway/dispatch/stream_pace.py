"""`Pace`: when what a stream showed came, and the `Lesson` that this is once it is whole: how fast one answer was made.

Told is how many tokens an answer has, not when each was made. That is told by what came in the time in which it was plainly being written:

- Between two moments at which text came, it was made in that time. What came with the first may have been made long before.
- A pause (a search at the provider, a queue, a parameter that comes whole, a proxy that holds events back) is taken out, with what came at
  its end: whether something was made in it, nobody knows. So are gaps in which thoughts came, those in which the reader was waited for, and
  those behind such a reader, in which what had lain in buffers came.
- What is left must be at least half a second, several gaps and most of the time since the first text, or the stream tells nothing.
- Thoughts that were told are no part of what came. Where more was told than can have been shown, some of it was thought unseen.
"""

from array import array

from anabranch.gateway.dispatch.output_speed import Lesson

# Shortest time, and fewest tokens and gaps, in which they tell something.
TELLING_S = 0.5
TELLING_TOKENS = 16
TELLING_GAPS = 4

# Part of the time since the first text that they must be.
TELLING_SHARE = 2 / 3

# What comes within so short a time came at one moment.
MOMENT_S = 0.02

# A longer gap is a pause, whatever the others are,
PAUSE_S = 1.0

# and a shorter one, if it is longer than so many of its kind, and not very short.
PAUSE_TIMES, NO_PAUSE_S = 4.0, 0.25

# Part of a gap in which the upstream was waited for, at least.
WAITED_SHARE = 0.75

# Gaps that are remembered: the first seconds of a long stream say how fast it is.
MOST_GAPS = 128

# English has so many bytes a token, most others fewer.
ENGLISH_BYTES = 4

# More than this over what can be seen was not shown.
SHOWN = 1.25


class Pace:
    """Of one stream, of which `took` is called whenever something of it was taken.

    Args:
        sent_at: when its request went out, in seconds.
    """

    __slots__ = (
        "_at",
        "_beside",
        "_bytes",
        "_gap_bytes",
        "_gap_s",
        "_gap_texts",
        "_is_mixed",
        "_left_out_s",
        "_sent_at",
        "_texts",
        "_waited_s",
    )

    def __init__(self, sent_at: float) -> None:
        self._sent_at = sent_at
        # The last moment, what had come by then, and how long the upstream had been waited for.
        self._at: float | None = None
        self._texts = self._bytes = self._beside = 0
        self._waited_s = 0.0
        # Something came since that makes the gap untelling.
        self._is_mixed = False
        self._gap_s, self._gap_texts, self._gap_bytes = array("d"), array("q"), array("q")
        self._left_out_s = 0.0

    def took(
        self, now: float, texts: int, text_bytes: int, beside: int, waited_s: float, is_behind: bool = False
    ) -> None:
        """All that was there has been taken.

        Args:
            now: seconds.
            texts, text_bytes: of the answer so far.
            beside: texts of its thoughts so far.
            waited_s: seconds in which the upstream was waited for so far.
            is_behind: there may be more, since its reader was slow.
        """
        self._is_mixed = self._is_mixed or is_behind or beside != self._beside
        self._beside = beside
        if texts == self._texts or len(self._gap_s) == MOST_GAPS:
            return
        if self._at is not None:
            gap_s = now - self._at
            if gap_s < MOMENT_S:
                return
            is_waited = waited_s - self._waited_s >= WAITED_SHARE * gap_s
            if self._is_mixed or not is_waited or gap_s > PAUSE_S:
                self._left_out_s += gap_s
            else:
                self._gap_s.append(gap_s)
                self._gap_texts.append(texts - self._texts)
                self._gap_bytes.append(text_bytes - self._bytes)
        self._at, self._texts, self._bytes, self._waited_s = now, texts, text_bytes, waited_s
        self._is_mixed = is_behind

    def lesson(
        self,
        now: float,
        told: int | None,
        thought: int,
        text_bytes: int,
        answers: int = 1,
        bytes_per_token: float = 1.0,
    ) -> Lesson:
        """What the stream tells, which is whole now.

        Args:
            now: seconds.
            told: tokens that its upstream said it came to; None if it did not say.
            thought: of them, those that it said were thoughts.
            text_bytes: of the answer, without thoughts.
            answers: that were made at the same time. How fast one was, several do not tell: they may be made one after another.
            bytes_per_token: of text, at least.
        """
        whole_s, least = now - self._sent_at, 0.0
        if told is not None and whole_s >= TELLING_S and told >= answers * TELLING_TOKENS:
            least = told / answers / whole_s
        seconds, texts, size = (0.0, 0, 0) if answers > 1 else self._telling()
        # Of each token so many bytes at least.
        most = max(texts, size / bytes_per_token)
        shown = most if told is None else (told - thought) * size / max(text_bytes, 1)
        if not seconds or shown < TELLING_TOKENS:
            return Lesson(None, least=least)
        if told is None:
            return Lesson(most / seconds, is_exact=False)
        speed, seen = shown / seconds, max(texts, size / ENGLISH_BYTES) / seconds
        if speed <= SHOWN * max(seen, told / whole_s):
            return Lesson(speed, least=least)
        return Lesson(min(speed, most / seconds), is_exact=False, least=least)

    def _telling(self) -> tuple[float, int, int]:
        """Seconds in which it was plainly being written, and the texts and bytes that came of them; none if they tell nothing."""
        if len(self._gap_s) < TELLING_GAPS:
            return 0.0, 0, 0
        usual_s = sorted(self._gap_s)[len(self._gap_s) // 2]
        longest_s = max(PAUSE_TIMES * usual_s, NO_PAUSE_S)
        kept = [at for at, gap_s in enumerate(self._gap_s) if gap_s <= longest_s]
        seconds = sum(self._gap_s[at] for at in kept)
        span_s = sum(self._gap_s) + self._left_out_s
        if len(kept) < TELLING_GAPS or seconds < max(TELLING_S, TELLING_SHARE * span_s):
            return 0.0, 0, 0
        return seconds, sum(self._gap_texts[at] for at in kept), sum(self._gap_bytes[at] for at in kept)
