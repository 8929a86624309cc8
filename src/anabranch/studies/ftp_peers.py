"""LLMLingua and kvpress beside FTP, each in an environment of its own: neither goes with the versions of transformers that we take.

    ANABRANCH_LLMLINGUA="/path/to/python" ANABRANCH_KVPRESS="/path/to/python" anabranch study ftp --full --arms llmlingua,kvpress

LLMLingua (arXiv 2310.05736) leaves tokens out of a prompt before the model: as many as leave it at least FTP's multiply-adds, over prompts
and continuations, so it is never at a disadvantage. That it reads the prompt itself, with the same model, is not counted, which favours it.

kvpress drops keys and values behind a dense prefill. It can never do as little as FTP does, since all of the prompt runs through all of the
blocks; so it gets as many keys as FTP holds on average over blocks, and its work, which is more, is told.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from anabranch.depth.ftp import Evaluation, evaluate_path, evaluate_shortened
from anabranch.depth.ftp.items import Item
from anabranch.depth.ftp.passes import dense_work
from anabranch.depth.stack import BlockStack
from anabranch.errors import BackendError

__all__ = ["VARIABLES", "Peer", "by_kvpress", "by_llmlingua", "running"]

PeerName = Literal["llmlingua", "kvpress"]
# The environment variable that says how the Python is called which has the package.
VARIABLES: dict[PeerName, str] = {"llmlingua": "ANABRANCH_LLMLINGUA", "kvpress": "ANABRANCH_KVPRESS"}
WORKER = Path(__file__).with_name("ftp_peers_worker.py")
# Halvings of the rate: to 1 in 64.
HALVINGS = 6
# Nats per token by which a model of transformers may differ from ours with nothing dropped, and items on which that is looked at.
TOLERANCE, LOOKED = 1e-2, 3
ENDS_IN_S = 10.0


class Peer:
    """A worker that is asked, line by line.

    Attributes:
        versions: of its packages.
    """

    def __init__(self, name: PeerName, process: subprocess.Popen[str]) -> None:
        self._name, self._process = name, process
        self.versions: dict[str, str] = self._answer()["ready"]

    def ask(self, **asked: Any) -> dict[str, Any]:
        """Its answer. Raises BackendError where it ended instead."""
        assert self._process.stdin is not None
        # Where it has ended nobody reads this, and that it has is told below.
        with suppress(OSError):
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise BackendError(
                f"the worker of {self._name} ended with code {code}; what it wrote stands above. {VARIABLES[self._name]} is "
                f"{os.environ.get(VARIABLES[self._name])!r}: it must start a Python that has {self._name}"
            )
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def running(name: PeerName, stack: BlockStack, tokenizer: Any) -> Iterator[Peer]:
    """A worker with the model of ``stack``, which it reads from a folder of transformers; both are gone afterwards.

    Raises BackendError where no Python is named, or it has not what is needed.
    """
    from anabranch.lm import export_huggingface

    said = os.environ.get(VARIABLES[name])
    if not said:
        raise BackendError(
            f"{VARIABLES[name]} is not set; name a Python that has {name} (pip install {name} in an environment of its own)"
        )
    model: Any = stack.module
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        export_huggingface(folder, model, tokenizer)
        command = [*shlex.split(said), str(WORKER), name, str(folder)]
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise BackendError(f"{VARIABLES[name]} is {said!r}, which cannot be started: {error.strerror}") from None
        try:
            yield Peer(name, process)
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """It ends by itself when nothing more is asked."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.close()
        process.wait(ENDS_IN_S)
    except (OSError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
    process.stdout.close()


def by_llmlingua(peer: Peer, stack: BlockStack, tokenizer: Any, items: Sequence[Item], work: int) -> Evaluation:
    """Likelihood of continuations behind prompts that LLMLingua has shortened, all by one rate: the least that does at least ``work``.

    The line's end behind a prompt, which says that an answer follows, is kept.
    """
    texts = [tokenizer.decode(list(item.prompt)).rstrip("\n") for item in items]
    best = list(items)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        rate = (low + high) / 2
        said = peer.ask(texts=texts, rate=rate)["texts"]
        shorter = [
            Item(tuple(tokenizer.encode(f"{text}\n")), item.continuation)
            for text, item in zip(said, items, strict=True)
        ]
        if _dense(stack, shorter) < work:
            low = rate
        else:
            best, high = min(best, shorter, key=lambda each: _dense(stack, each)), rate
    return evaluate_shortened(stack, items, best)


def _dense(stack: BlockStack, items: Sequence[Item]) -> int:
    return sum(dense_work(stack, len(item.tokens) - 1) for item in items)


def by_kvpress(peer: Peer, stack: BlockStack, items: Sequence[Item], ratio: float) -> Evaluation:
    """Likelihood of continuations where ``ratio`` of the keys of each layer is dropped behind a dense prefill.

    Raises BackendError where the model in its environment is another than ours: with nothing dropped it must give what ours gives.
    """
    looked = list(items[:LOOKED])
    whole = peer.ask(items=[_pair(item) for item in looked], ratio=0.0)
    ours = evaluate_path(stack, looked)
    theirs = sum(whole["nats"]) / ours.tokens
    if not abs(theirs - ours.nats_per_token) <= TOLERANCE:
        raise BackendError(
            f"with nothing dropped kvpress gives {theirs:.4f} nats per token and we {ours.nats_per_token:.4f}; they must be of one model"
        )
    found = peer.ask(items=[_pair(item) for item in items], ratio=ratio)
    tokens = [len(item.continuation) for item in items]
    work = sum(
        dense_work(stack, len(item.prompt)) + sum(dense_work(stack, 1, past=stored + more) for more in range(count - 1))
        for item, stored, count in zip(items, found["stored"], tokens, strict=True)
    )
    return Evaluation(
        sum(found["nats"]),
        sum(tokens),
        work,
        _dense(stack, items),
        tuple(found["following"]),
        item_nats=tuple(nats / count for nats, count in zip(found["nats"], tokens, strict=True)),
    )


def _pair(item: Item) -> list[list[int]]:
    return [list(item.prompt), list(item.continuation)]
