"""``anabranch chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from anabranch.bounds import MOST_SEED
from anabranch.cli.boundary import USER_ERROR
from anabranch.cli.continuing import (
    AS_MODEL_SAYS,
    AS_STORED,
    PLAIN,
    WHOLE,
    Adapted,
    Deep,
    Loading,
    Sampled,
    engine_alone,
    running,
    tokens_of,
)
from anabranch.cli.option_sets import takes_sets
from anabranch.cli.options import AsJson, Model, Seed, Streams
from anabranch.cli.output import print_json, print_line, say, visible
from anabranch.cli.rewired import Rewired, Turned, is_plain, library_fields
from anabranch.errors import AnabranchError, ConfigError
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.serving.engine.background import Background


# What neither the user nor the model says.
_USUAL = {"temperature": 0.2, "top_p": 0.9}
_AS_THEY_ARE = Turned()


@takes_sets(temperature="0.2", top_p="0.9", turned="before each answer, then every 128 tokens of it")
def chat(
    model: Model,
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", help="Answer this one message and exit.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum number of tokens in an answer.")] = 256,
    sampled: Sampled = AS_MODEL_SAYS,
    seed: Seed = 0,
    streams: Streams = None,
    turned: Turned = _AS_THEY_ARE,
    adapted: Adapted = PLAIN,
    deep: Deep = WHOLE,
    loading: Loading = AS_STORED,
    as_json: AsJson = False,
) -> None:
    """Talk with a model, with its own chat template.

    Each line is a message. /reset starts a new conversation; /quit or Ctrl-D ends. A message that cannot be answered is reported and
    dropped from the conversation.

    With --depth (Dr.LLM) or --skipper (FTP), the conversation so far decides at each message which blocks run, or which tokens each block
    computes. --json then has a field depth, as in generate.

    --rewire needs a mixture of experts. What is fitted stays from message to message, until /reset. --json then has a field rewiring, as in
    generate. See the page Rewiring.
    """
    require("lm", by="anabranch chat")
    from anabranch.serving.load import check_depth

    if as_json and message is None:
        raise ConfigError("--json needs a message; give one with --message")
    depth = deep.config()
    apart = engine_alone(sampled, streams, loading, deep, adapted)
    rewiring = turned.config({**apart, "--expert-budget": None})
    plain = is_plain(rewiring, loading.quantize, loading.expert_budget)
    fields = {**sampled.of(model, _USUAL), "max_tokens": max_tokens}
    check_depth(depth, model)
    adapted.check(model)
    adapters = adapted.config()
    loaded = loading.load(model, is_plain=plain, adapters=adapters)
    tokenizer: Any = loaded.tokenizer
    # A number that cannot be is no matter of a message.
    loaded.model.streams_of(streams)
    room = loaded.model.config.max_positions
    with ExitStack() as stack:
        rewired = None
        if rewiring is not None:
            if loaded.experts is not None:
                stack.callback(loaded.experts.close)
            fields = library_fields(fields, "--rewire", talks=True)
            rewired = Rewired(loaded.model, rewiring, tokenizer.stop_ids)
        voice: Voice = rewired or _OfEngine(
            stack.enter_context(
                running(loaded, room, streams=streams, prefix_cache=True, depth=depth, adapters=adapters)
            ),
            streams,
            adapted,
        )
        talk = Conversation(voice, tokenizer, system, fields)
        if message is None:
            _talk(model, talk, seed)
            return
        ids, answer = talk.answer(message, seed, show=not as_json)
        if as_json:
            ran = {"depth": {"num_layers": len(loaded.model.blocks), **voice.ran}} if voice.ran else {}
            told = {} if rewired is None else {"rewiring": rewired.report()}
            print_json({"text": answer, "token_ids": ids, "messages": talk.messages, **told, **ran})


def _talk(model: str, talk: Conversation, seed: int) -> None:
    """Answer messages until the input ends."""
    interactive = sys.stdin.isatty()
    if interactive:
        say(f"{model} is listening. /reset begins again, /quit leaves.")
    is_answered = True
    while (line := _read_line(interactive)) not in (None, "/quit"):
        if line == "/reset":
            talk.reset()
            is_answered = True
        elif line:
            is_answered = _try(talk, line, (seed + len(talk.messages)) % (MOST_SEED + 1))
    if not is_answered and not interactive:
        raise typer.Exit(USER_ERROR)


def _try(talk: Conversation, line: str, seed: int) -> bool:
    """Whether a message was answered; one that cannot be is taken back, and why is said."""
    before, mark = list(talk.messages), talk.voice.mark()
    try:
        talk.answer(line, seed)
    except AnabranchError as error:
        talk.messages = before
        talk.voice.back(mark)
        say(f"error: {' '.join(str(error).split())}")
        return False
    return True


class Voice(Protocol):
    """What continues the prompts of a conversation.

    Attributes:
        most: positions that it reads.
        ran: what routers of depth, or a skipper, chose for the last prompt, see `tokens_of`; empty without them.
    """

    most: int
    ran: dict[str, Any]

    def tokens(self, prompt: Sequence[int], fields: dict[str, Any], asked: str = "") -> Iterator[int]:
        """The answer's tokens as they come; ``fields`` of sampling, ``asked`` what the last message asks."""
        ...

    def notes(self) -> list[str]:
        """Lines about the last prompt."""
        ...

    def mark(self) -> Any:
        """What it keeps of the prompts so far, to go `back` to."""
        ...

    def back(self, mark: Any) -> None:
        """Keep what it kept then."""
        ...

    def forget(self) -> None:
        """Keep nothing."""
        ...


class _OfEngine:
    """An engine, which keeps nothing of a prompt but what makes the next one faster."""

    def __init__(self, engine: Background, streams: int | None, adapted: Adapted) -> None:
        self._engine, self._streams, self._adapted = engine, streams, adapted
        self.most, self.ran = engine.info.max_positions, dict[str, Any]()

    def tokens(self, prompt: Sequence[int], fields: dict[str, Any], asked: str = "") -> Iterator[int]:
        """See `Voice`."""
        self.ran = {}
        depth = self._engine.info.depth
        more: dict[str, Any] = {"streams": self._streams, "told": self.ran, "adapted": self._adapted}
        return tokens_of(self._engine, prompt, fields, depth=depth, asked=asked, **more)

    def notes(self) -> list[str]:
        """See `Voice`."""
        return []

    def mark(self) -> None:
        """See `Voice`."""

    def back(self, mark: None) -> None:
        """See `Voice`."""

    def forget(self) -> None:
        """See `Voice`."""


class Conversation:
    """Messages so far, and the voice that answers them. ``sampling`` are its fields of sampling."""

    def __init__(self, voice: Voice, tokenizer: Any, system: str | None, sampling: dict[str, Any]) -> None:
        self.voice, self._tokenizer, self._system, self._sampling = voice, tokenizer, system, sampling
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system is not None else []
        self.voice.forget()

    def answer(self, text: str, seed: int, *, show: bool = True) -> tuple[list[int], str]:
        """Add a message of the user's and the model's answer; returns the answer's ids and text. ``show`` prints it as it comes."""
        from anabranch.serving.core.query import last_asked

        self.messages.append({"role": "user", "content": text})
        prompt = self._tokenizer.encode_chat(self._tokenizer.apply_chat_template(self.messages))
        most = self.voice.most
        room = most - len(prompt)
        if room < 1:
            is_first = all(message["role"] == "system" for message in self.messages[:-1])
            advice = "shorten the message" if is_first else "begin again with /reset, or shorten the message"
            raise ConfigError(f"the conversation has {len(prompt)} tokens, and the model reads {most}; {advice}")
        fields = {**self._sampling, "max_tokens": min(self._sampling["max_tokens"], room), "seed": seed}
        decoder, ids, pieces = self._tokenizer.stream(), [], []
        try:
            for token in self.voice.tokens(prompt, fields, last_asked(self.messages)):
                ids.append(token)
                pieces.append(decoder.push(token))
                if show:
                    print(visible(pieces[-1]), end="", flush=True)
        except KeyboardInterrupt:
            # Ends this answer, not the conversation.
            if not sys.stdin.isatty():
                raise
        pieces.append(decoder.flush())
        if show:
            print_line(pieces[-1])
        for note in self.voice.notes():
            say(note)
        answer = "".join(pieces)
        self.messages.append({"role": "assistant", "content": answer})
        return ids, answer


def _read_line(interactive: bool) -> str | None:
    """The next message, None at the end of input."""
    if interactive:
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line and interactive:
        say()
    return line.strip() if line else None
