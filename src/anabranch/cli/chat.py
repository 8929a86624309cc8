"""``anabranch chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.bounds import MOST_SEED
from anabranch.cli.boundary import USER_ERROR
from anabranch.cli.continuing import MinP, RepetitionPenalty, TopK, running, sampling_fields, tokens_of
from anabranch.cli.options import (
    AsJson,
    Device,
    Dtype,
    ExpertBudget,
    Memory,
    Model,
    Quantize,
    Seed,
    Streams,
    load_parts,
)
from anabranch.cli.output import print_json, say, visible
from anabranch.errors import AnabranchError, ConfigError
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.serving.engine.background import Background


def chat(
    model: Model,
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", help="Answer this one message and leave.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told before the conversation.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", min=0, help="0 takes the likeliest token. Default: as the model says, else 0.2."),
    ] = None,
    top_k: TopK = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Sample among the likeliest that make up P. Default: as the model says, else 0.9."
        ),
    ] = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = 0,
    streams: Streams = None,
    memory: Memory = None,
    quantize: Quantize = None,
    expert_budget: ExpertBudget = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Talk with a model, using its own chat template.

    A line is a message; /reset begins again, /quit or Ctrl-D leaves. A message that cannot be answered is told and left out.
    """
    require("lm", by="anabranch chat")
    if as_json and message is None:
        raise ConfigError("--json answers one message; give it with --message")
    said = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    fields = {**sampling_fields(model, said, {"temperature": 0.2, "top_p": 0.9}), "max_tokens": max_tokens}
    loaded = load_parts(model, dtype, device, quantize, expert_budget, memory)
    # A number that cannot be is no matter of a message.
    loaded.model.streams_of(streams)
    with running(loaded, loaded.model.config.max_positions, streams=streams, prefix_cache=True) as engine:
        talk = Conversation(engine, loaded.tokenizer, system, fields, num_streams=streams)
        if message is not None:
            ids, answer = talk.answer(message, seed, show=not as_json)
            if as_json:
                print_json({"text": answer, "token_ids": ids, "messages": talk.messages})
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
    """Messages so far, and the engine that answers them. ``sampling`` are fields of `anabranch.serving.Sampling`."""

    def __init__(
        self,
        engine: Background,
        tokenizer: Any,
        system: str | None,
        sampling: dict[str, Any],
        *,
        num_streams: int | None = None,
    ) -> None:
        self._engine, self._tokenizer, self._system, self._sampling = engine, tokenizer, system, sampling
        self._num_streams = num_streams
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
            for token in tokens_of(self._engine, prompt, fields, streams=self._num_streams):
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


def _read_line(interactive: bool) -> str | None:
    """The next message, None at the end of input."""
    if interactive:
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line and interactive:
        say()
    return line.strip() if line else None
