"""``anabranch chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

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
    running,
    tokens_of,
)
from anabranch.cli.option_sets import takes_sets
from anabranch.cli.options import AsJson, Model, Seed, Streams
from anabranch.cli.output import print_json, say, visible
from anabranch.errors import AnabranchError, ConfigError
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.serving.engine.background import Background


# What neither the user nor the model says.
_USUAL = {"temperature": 0.2, "top_p": 0.9}


@takes_sets(temperature="0.2", top_p="0.9")
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
    """
    require("lm", by="anabranch chat")
    from anabranch.serving.load import check_depth

    if as_json and message is None:
        raise ConfigError("--json needs a message; give one with --message")
    depth = deep.config()
    fields = {**sampled.of(model, _USUAL), "max_tokens": max_tokens}
    check_depth(depth, model)
    adapted.check(model)
    adapters = adapted.config()
    loaded = loading.load(model, adapters=adapters)
    # A number that cannot be is no matter of a message.
    loaded.model.streams_of(streams)
    room = loaded.model.config.max_positions
    with running(loaded, room, streams=streams, prefix_cache=True, depth=depth, adapters=adapters) as engine:
        talk = Conversation(engine, loaded.tokenizer, system, fields, num_streams=streams, adapted=adapted)
        if message is not None:
            ids, answer = talk.answer(message, seed, show=not as_json)
            if as_json:
                ran = {"depth": {"num_layers": len(loaded.model.blocks), **talk.ran}} if talk.ran else {}
                print_json({"text": answer, "token_ids": ids, "messages": talk.messages, **ran})
            return
        _talk(model, talk, seed)


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
    before = list(talk.messages)
    try:
        talk.answer(line, seed)
    except AnabranchError as error:
        talk.messages = before
        say(f"error: {' '.join(str(error).split())}")
        return False
    return True


class Conversation:
    """Messages so far, and the engine that answers them. ``sampling`` are fields of `anabranch.serving.Sampling`.

    Attributes:
        ran: what routers of depth, or a skipper, chose for the last message, see `tokens_of`; empty without them.
    """

    def __init__(
        self,
        engine: Background,
        tokenizer: Any,
        system: str | None,
        sampling: dict[str, Any],
        *,
        num_streams: int | None = None,
        adapted: Adapted = PLAIN,
    ) -> None:
        self._adapted = adapted
        self._engine, self._tokenizer, self._system, self._sampling = engine, tokenizer, system, sampling
        self._num_streams = num_streams
        self.ran: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system is not None else []

    def answer(self, text: str, seed: int, *, show: bool = True) -> tuple[list[int], str]:
        """Add a message of the user's and the model's answer; returns the answer's ids and text. ``show`` prints it as it comes."""
        self.messages.append({"role": "user", "content": text})
        prompt = self._tokenizer.encode_chat(self._tokenizer.apply_chat_template(self.messages))
        most = self._engine.info.max_positions
        room = most - len(prompt)
        if room < 1:
            is_first = all(message["role"] == "system" for message in self.messages[:-1])
            advice = "shorten the message" if is_first else "begin again with /reset, or shorten the message"
            raise ConfigError(f"the conversation has {len(prompt)} tokens, and the model reads {most}; {advice}")
        fields = {**self._sampling, "max_tokens": min(self._sampling["max_tokens"], room), "seed": seed}
        decoder, ids, pieces = self._tokenizer.stream(), [], []
        try:
            for token in self._tokens(prompt, fields):
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
            print(pieces[-1])
        answer = "".join(pieces)
        self.messages.append({"role": "assistant", "content": answer})
        return ids, answer

    def _tokens(self, prompt: Sequence[int], fields: dict[str, Any]) -> Iterator[int]:
        """The answer's tokens as they come."""
        from anabranch.serving.core.query import last_asked

        self.ran = {}
        depth = self._engine.info.depth
        more: dict[str, Any] = {"streams": self._num_streams, "told": self.ran, "adapted": self._adapted}
        return tokens_of(self._engine, prompt, fields, depth=depth, asked=last_asked(self.messages), **more)


def _read_line(interactive: bool) -> str | None:
    """The next message, None at the end of input."""
    if interactive:
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line and interactive:
        say()
    return line.strip() if line else None
