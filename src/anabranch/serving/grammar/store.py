"""`GrammarStore`: the grammars of an engine: compiled beside its loop, kept for the next request, bounded in all they take."""

import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import InputError
from anabranch.extras import is_installed
from anabranch.serving.core.client import BusyError
from anabranch.serving.core.turns import Turns
from anabranch.serving.grammar.forms import key_of, text_of
from anabranch.serving.grammar.grammar import Grammar
from anabranch.serving.grammar.trial import try_out
from anabranch.serving.grammar.vocabulary import vocabulary_of

__all__ = ["GrammarStore"]

# Of all grammars that are kept or in use. Those of one source may take no more than all together leave free (dynamic thresholds, Choudhury
# and Hahne, IEEE/ACM ToN 1998): one alone has half of it, each of three a quarter, and who comes last finds room.
MOST_BYTES = 512 << 20

# Of one source, that are still to be compiled.
MOST_WAITING = 256

# For others to end, where all memory is in use.
WAIT_S = 20.0

# Least recently used go first.
_MOST_KEPT, _MOST_REFUSED = 64, 256

# That one counts as.
_LEAST_BYTES = 1 << 18

# Most of them wait for a trial; one at a time compiles.
_THREADS = 8

# Of them, for one source.
_AT_ONCE = 2


@dataclass(eq=False)
class _Compiling:
    """A grammar that is to be compiled, and who waits for it; what nobody waits for any longer never is."""

    work: "Future[Grammar]"
    waiting: "list[Future[Grammar]]" = field(default_factory=list)


class GrammarStore:
    """Grammars for one tokenizer. Safe for threads.

    Args:
        tokenizer: whose tokens are masked; None refuses every grammar.
        ends: the model's end-of-text tokens beside the tokenizer's own.
        is_tried: somebody else has tried out what comes (`try_out`).
    """

    def __init__(self, tokenizer: Tokenizer | None, ends: Sequence[int] = (), *, is_tried: bool = False) -> None:
        self.tokenizer, self._is_tried = tokenizer, is_tried
        self._ends = (*(tokenizer.stop_ids if tokenizer is not None else ()), *ends)
        # A cancelled future tells of it where it is cancelled, be that under the lock.
        self._lock, self._compiling = threading.RLock(), threading.Lock()
        self._turns: Turns | None = None
        # By source and form: one who sends what another has sent before does not wait in the other's queue.
        self._under_way: dict[tuple[str, str], _Compiling] = {}
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._refused: OrderedDict[str, str] = OrderedDict()
        self._in_use: weakref.WeakValueDictionary[str, Grammar] = weakref.WeakValueDictionary()
        # Bytes by source of what is being compiled.
        self._reserved: Counter[str] = Counter()

    def warm_up(self) -> None:
        """Read the vocabulary now, before there is anybody whom that could hold up: half a second for 150,000 tokens."""
        if self.tokenizer is not None and is_installed("llguidance"):
            # Whoever sends a grammar is told.
            with suppress(InputError):
                vocabulary_of(self.tokenizer)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token, those of marks included; none for other special tokens and ids without a token."""
        if self.tokenizer is None or not 0 <= token < self.tokenizer.vocab_size:
            return b""
        return vocabulary_of(self.tokenizer).pieces[token]

    def prepare(self, form: Any, source: str = "") -> "Future[Grammar]":
        """The grammar of ``form``, at once if it is known, else when it has been compiled in another thread.

        Args:
            form: a JSON schema, or see `anabranch.serving.grammar.forms`.
            source: who sends it; sources take turns, and share the memory.

        The future raises InputError for one that cannot be followed, BusyError where too much is asked at a time, MissingExtraError. Cancel
        it when nobody wants the grammar any longer: one that has not begun then never does.
        """
        future: Future[Grammar] = Future()
        try:
            key = self._key_of(form)
        except InputError as error:
            future.set_exception(error)
            return future
        with self._lock:
            known = self._known(key)
            if known is not None:
                future.set_result(known)
            elif key in self._refused:
                future.set_exception(InputError(self._refused[key]))
            else:
                self._join(future, source, key, form)
        return future

    def _join(self, future: "Future[Grammar]", source: str, key: str, form: Any) -> None:
        """Under the lock: begin to compile, unless that is under way, and have ``future`` told."""
        place = source, key
        compiling = self._under_way.get(place)
        if compiling is None:
            if self._turns is None:
                self._turns = Turns(
                    "anabranch-grammar",
                    "grammars wait to be compiled",
                    threads=_THREADS,
                    at_once=_AT_ONCE,
                    most_waiting=MOST_WAITING,
                )
            try:
                compiling = _Compiling(self._turns.submit(source, self._compile, key, form, source))
            except BusyError as error:
                future.set_exception(error)
                return
            self._under_way[place] = compiling
            compiling.work.add_done_callback(partial(self._settle, place))
        compiling.waiting.append(future)
        future.add_done_callback(partial(self._left, place))

    def get(self, form: Any) -> Grammar:
        """The grammar of ``form``, compiled here and now unless it is known. Raises as the future of `prepare`."""
        return self.prepare(form).result()

    def close(self) -> None:
        """End the threads; what is still to be compiled never is."""
        with self._lock:
            turns, self._turns = self._turns, None
        if turns is not None:
            turns.close()

    def _key_of(self, form: Any) -> str:
        if self.tokenizer is None:
            raise InputError("a grammar needs the model's tokenizer, which this engine was not given")
        return key_of(form)

    def _known(self, key: str) -> Grammar | None:
        """Under the lock."""
        grammar = self._in_use.get(key)
        if grammar is not None:
            self._kept[key] = grammar
            self._kept.move_to_end(key)
        return grammar

    def _left(self, place: tuple[str, str], future: "Future[Grammar]") -> None:
        """One who waited is done; where they have been cancelled, and were the last, so is the work."""
        with self._lock:
            compiling = self._under_way.get(place)
            if compiling is not None and future in compiling.waiting:
                compiling.waiting.remove(future)
                if not compiling.waiting:
                    compiling.work.cancel()

    def _settle(self, place: tuple[str, str], work: "Future[Grammar]") -> None:
        """Tell who waits."""
        with self._lock:
            compiling = self._under_way.pop(place)
            error = None if work.cancelled() else work.exception()
            if isinstance(error, InputError):
                self._refused[place[1]] = str(error)
                if len(self._refused) > _MOST_REFUSED:
                    self._refused.popitem(last=False)
            waiting, compiling.waiting = compiling.waiting, []
        for future in waiting:
            if work.cancelled():
                future.cancel()
            # It was cancelled a moment ago.
            elif not future.set_running_or_notify_cancel():
                continue
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(work.result())

    def _compile(self, key: str, form: Any, source: str) -> Grammar:
        """In a thread."""
        assert self.tokenizer is not None
        with self._lock:
            # Another source was first.
            known = self._known(key)
        if known is not None:
            return known
        text = text_of(form)
        size = max(_LEAST_BYTES, 0 if self._is_tried else try_out(text, source))
        with self._room(size, source), self._compiling:
            grammar = Grammar(text, vocabulary_of(self.tokenizer), self._ends, size, source)
            with self._lock:
                self._in_use[key] = self._kept[key] = grammar
                while len(self._kept) > _MOST_KEPT:
                    self._let_go()
        return grammar

    @contextmanager
    def _room(self, size: int, source: str) -> Iterator[None]:
        """Memory for one more: lets go of what nobody uses, waits for what somebody does. Raises BusyError after `WAIT_S`."""
        end = time.monotonic() + WAIT_S
        while not self._has_room(size, source):
            if time.monotonic() > end:
                used = self._bytes()
                raise BusyError(
                    f"busy: the grammars of the requests under way take {used.total() >> 20} of {MOST_BYTES >> 20} MiB, yours "
                    f"{used[source] >> 20}; ask again"
                )
            time.sleep(0.01)
        try:
            yield
        finally:
            with self._lock:
                self._reserved[source] -= size
                self._reserved += Counter()

    def _has_room(self, size: int, source: str) -> bool:
        """Whether there is room now, which is then reserved."""
        with self._lock:
            while True:
                used = self._bytes()
                if used[source] + size <= MOST_BYTES - used.total() - size:
                    self._reserved[source] += size
                    return True
                if not self._kept:
                    return False
                self._let_go()

    def _let_go(self) -> None:
        """Under the lock: forget the oldest that is kept of the source that has most."""
        most = Counter(grammar.source for grammar in self._kept.values()).most_common(1)[0][0]
        del self._kept[next(key for key, grammar in self._kept.items() if grammar.source == most)]

    def _bytes(self) -> Counter[str]:
        """By source."""
        used = Counter(self._reserved)
        for grammar in list(self._in_use.values()):
            used[grammar.source] += grammar.size_bytes
        return used
