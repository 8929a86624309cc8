"""`GrammarStore`: the grammars of an engine: compiled beside its loop, kept for the next request, bounded in all they take."""

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import InputError
from anabranch.extras import is_installed
from anabranch.serving.core.client import BusyError
from anabranch.serving.grammar.forms import key_of, text_of
from anabranch.serving.grammar.grammar import Grammar
from anabranch.serving.grammar.trial import try_out
from anabranch.serving.grammar.vocabulary import vocabulary_of

__all__ = ["GrammarStore"]

# Of all grammars that are kept or in use.
MOST_BYTES = 512 << 20

# Requests whose grammars are still to be compiled.
MOST_WAITING = 256

# For others to end, where all memory is in use.
WAIT_S = 20.0

# Least recently used go first.
_MOST_KEPT, _MOST_REFUSED = 64, 256

# That one counts as.
_LEAST_BYTES = 1 << 18

# Most of them wait for a trial; one at a time compiles.
_THREADS = 4


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
        self._lock, self._compiling = threading.Lock(), threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._under_way: dict[str, Future[Grammar]] = {}
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._refused: OrderedDict[str, str] = OrderedDict()
        self._in_use: weakref.WeakValueDictionary[str, Grammar] = weakref.WeakValueDictionary()

    def warm_up(self) -> None:
        """Read the vocabulary now, before there is anybody whom that could hold up: half a second for 150,000 tokens."""
        if self.tokenizer is not None and is_installed("llguidance"):
            # Whoever sends a grammar is told.
            with suppress(InputError):
                vocabulary_of(self.tokenizer)

    def prepare(self, form: Any, source: str = "") -> "Future[Grammar]":
        """The grammar of ``form``, at once if it is known, else when it has been compiled in another thread.

        Args:
            form: a JSON schema, or see `anabranch.serving.grammar.forms`.
            source: who sends it; sources take turns.

        The future raises InputError for one that cannot be followed, BusyError where too much is asked at a time, MissingExtraError.
        """
        future: Future[Grammar] = Future()
        try:
            key = self._key_of(form)
        except InputError as error:
            future.set_exception(error)
            return future
        with self._lock:
            if key in self._under_way:
                return self._under_way[key]
            known = self._known(key)
            if known is not None:
                future.set_result(known)
            elif key in self._refused:
                future.set_exception(InputError(self._refused[key]))
            elif len(self._under_way) >= MOST_WAITING:
                future.set_exception(BusyError(f"busy: {MOST_WAITING} grammars wait to be compiled; ask again"))
            else:
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(_THREADS, "anabranch-grammar")
                self._under_way[key] = future
                self._threads.submit(self._settle, key, form, source, future)
        return future

    def get(self, form: Any) -> Grammar:
        """The grammar of ``form``, compiled here and now unless it is known. Raises as the future of `prepare`."""
        return self.prepare(form).result()

    def close(self) -> None:
        """End the threads; what is still to be compiled never is."""
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)

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

    def _settle(self, key: str, form: Any, source: str, future: "Future[Grammar]") -> None:
        """In a thread: compile it, and tell who waits."""
        try:
            grammar = self._compile(form, source)
        except BaseException as error:
            with self._lock:
                self._under_way.pop(key, None)
                if isinstance(error, InputError):
                    self._refused[key] = str(error)
                    if len(self._refused) > _MOST_REFUSED:
                        self._refused.popitem(last=False)
            future.set_exception(error)
            return
        with self._lock:
            self._under_way.pop(key, None)
            self._in_use[key] = self._kept[key] = grammar
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        future.set_result(grammar)

    def _compile(self, form: Any, source: str) -> Grammar:
        assert self.tokenizer is not None
        text = text_of(form)
        size = max(_LEAST_BYTES, 0 if self._is_tried else try_out(text, source))
        with self._compiling:
            vocabulary = vocabulary_of(self.tokenizer)
            self._make_room(size)
            return Grammar(text, vocabulary, self._ends, size)

    def _make_room(self, size: int) -> None:
        """Let go of what nobody uses; wait for what somebody does. Raises BusyError after `WAIT_S`."""
        end = time.monotonic() + WAIT_S
        while True:
            with self._lock:
                while self._kept and self._bytes() + size > MOST_BYTES:
                    self._kept.popitem(last=False)
                if self._bytes() + size <= MOST_BYTES:
                    return
            if time.monotonic() > end:
                raise BusyError(f"busy: the grammars of the requests under way take {MOST_BYTES >> 20} MiB; ask again")
            time.sleep(0.01)

    def _bytes(self) -> int:
        return sum(grammar.size_bytes for grammar in list(self._in_use.values()))
