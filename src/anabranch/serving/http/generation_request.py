"""`GenerationRequest`: a request that was checked and understood: prompts as tokens, how to sample, what to show of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from anabranch.errors import InputError
from anabranch.serving.chat import Dialect, FieldError, Tools, read_tools
from anabranch.serving.chat.reasoning import Reasoning
from anabranch.serving.core.client import EngineInfo
from anabranch.serving.core.mixture import Mixture
from anabranch.serving.core.query import asked_in, last_asked
from anabranch.serving.core.request import Sampling
from anabranch.serving.core.rewires import SETTINGS, Rewires
from anabranch.serving.grammar.forms import key_of
from anabranch.serving.http import fields
from anabranch.serving.http.answer_text import AnswerText
from anabranch.serving.http.choice import SCORE_BYTES
from anabranch.serving.http.fields import FieldName, by_name, of_field, unsupported, unsupported_field
from anabranch.serving.http.reading import Reader
from anabranch.web.api_error import ApiError, wrong, wrong_field
from anabranch.web.body import is_int, said

# Of /v1/completions where a request does not say, as OpenAI's.
COMPLETION_TOKENS = 16
MOST_PROMPTS = 128
# Log probabilities that an answer has at a time, of prompts and of what is told whole, those of rivals among them: 256 MiB hold so many.
MOST_SCORES = 1 << 21
_TO_SAMPLING = (
    "min_tokens",
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request.

    Attributes:
        kind: ``chat`` or ``completions``.
        model: the name it calls the model by.
        prompts: token ids of each prompt; a chat has one.
        max_tokens: most new tokens; 0 only with ``echo``.
        texts: of the prompts, for ``echo``.
        n: choices for each prompt.
        sampling: of each, but for the seed, see `sampling_of`.
        stop: strings that end a choice.
        is_stream, has_usage: answer in events; with a chunk of usage at the end.
        logprobs: how many alternatives to tell beside each token, with ``echo`` of the prompt too; None for none.
        is_echo: put the prompt before the answer.
        tools: what may be called.
        reasoning: how the model's reasoning is told apart; None where it is part of the text.
        is_routing: tell which experts each token went to.
        priority, cache_salt, num_streams, adapters, task: see `Request`.
        adapter_versions: see `AdapterNames.told`.
        query: the instruction that routers of adapters compare, as it is; None for what is asked last (`asked`), or the prompt, of which
            the writer of a pool makes one.
        asked: the last message of a chat that a user wrote.
        depth: ``full``, ``routed``, ``pruned``, or the blocks to run.
        depth_control: see `Request`.
        rewires: turn the routers of its experts to its text, see `Request`.
        unknown: fields that nobody knows.
        response_of: the request to ``/v1/responses`` that this chat is made of; None for any other.
    """

    kind: str
    model: str
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int = 1
    texts: tuple[str, ...] = ()
    n: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    is_stream: bool = False
    has_usage: bool = False
    logprobs: int | None = None
    is_echo: bool = False
    tools: Tools | None = None
    reasoning: Reasoning | None = None
    is_routing: bool = False
    priority: int = 0
    cache_salt: str = ""
    num_streams: int | None = None
    depth: str | tuple[int, ...] = "full"
    depth_control: float | None = None
    adapters: Mixture = ()
    adapter_versions: tuple[tuple[str, str], ...] = ()
    task: str | None = None
    query: str | None = None
    asked: str = ""
    rewires: bool | Rewires = False
    unknown: tuple[str, ...] = ()
    response_of: dict[str, Any] | None = None

    @property
    def num_choices(self) -> int:
        """Sequences in all."""
        return self.n * len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def score_bytes(self) -> int:
        """Memory of the log probabilities of prompts, which are there before anything is told."""
        asked = self.sampling.prompt_logprobs
        return 0 if asked is None else self.prompt_tokens * (1 + asked) * SCORE_BYTES

    def text(self, reader: Reader) -> AnswerText:
        """What makes the text of a choice."""
        return AnswerText(reader, self.stop, self.reasoning, shows_marks=self.tools is not None)

    def asked_of(self, prompt: int) -> dict[str, Any]:
        """Fields of a `Request` that say what a prompt asks for, in words, for routers of adapters."""
        return asked_in(self.texts[prompt] if self.texts else "", self.asked, told=self.query)

    @property
    def grammar_param(self) -> str | None:
        """The field of the request that its grammar comes from."""
        if self.sampling.grammar is None:
            return None
        if self.tools is not None and self.tools.is_demanded:
            return "tools"
        return "response_format" if self.response_of is None else "text.format"

    def sampling_of(self, choice: int) -> Sampling:
        """Choices of one prompt differ in their seeds, so each can be had again; the first brings the prompt's scores for all."""
        changes: dict[str, Any] = {}
        if self.sampling.seed is not None:
            changes["seed"] = (self.sampling.seed + choice) % fields.INT64
        if choice and self.sampling.prompt_logprobs is not None:
            changes["prompt_logprobs"] = None
        return replace(self.sampling, **changes) if changes else self.sampling


def read_chat(
    body: dict[str, Any],
    reader: Reader,
    info: EngineInfo,
    most_n: int,
    names: Mapping[str, FieldName] | None = None,
    *,
    default_tokens: int | None = None,
) -> GenerationRequest:
    """A request to ``/v1/chat/completions``; one that names no end gets ``default_tokens`` at most, None for all that there is room for.

    Raises ApiError (400) that names the field, by ``names`` of another API (see `by_name`).
    """
    try:
        return _read_chat(body, reader, info, most_n, default_tokens)
    except ApiError as error:
        raise by_name(error, names or {}) from None


def _read_chat(
    body: dict[str, Any], reader: Reader, info: EngineInfo, most_n: int, default_tokens: int | None
) -> GenerationRequest:
    unknown = fields.check(body, "chat")
    body = reader.with_defaults(body)
    if body.get("messages") is None:
        raise wrong_field("messages", "is missing; it must be a list of at least one message")
    tools = _tools(body)
    grammar = _grammar(body, tools, reader.dialect)
    values, unknown_values = reader.template_values(body)
    text = reader.render(body["messages"], tools, values=values)
    prompt, reasoning = reader.encode_chat(text), reader.dialect.reasoning_after(text)
    if body.get("top_logprobs") is not None and not body.get("logprobs"):
        raise wrong("top_logprobs", "top_logprobs needs logprobs to be true")
    logprobs = (body.get("top_logprobs") or 0) if body.get("logprobs") else None
    asked = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    wanted = body.get(asked)
    if wanted == 0:
        raise wrong("max_tokens", "max_tokens is 0; it must be at least 1")
    most = _room([prompt], wanted, default_tokens, info, "messages", asked)
    most = _scored(most, body, [prompt], logprobs, asked, is_echo=False)
    shared = _shared(body, info, most, most_n, logprobs, grammar)
    if grammar is not None:
        is_call = tools is not None and tools.is_demanded
        preamble = reader.dialect.preamble(reasoning, reader.tokenizer, is_call=is_call)
        if reasoning is not None and not is_call:
            reasoning = replace(reasoning, is_formed=True)
        shared["sampling"] = replace(shared["sampling"], preamble=preamble)
    return GenerationRequest(
        kind="chat",
        prompts=(prompt,),
        tools=tools,
        reasoning=reasoning,
        logprobs=logprobs,
        **shared,
        unknown=(*unknown, *unknown_values),
        asked=last_asked(body["messages"]),
    )


def read_completion(
    body: dict[str, Any], reader: Reader, info: EngineInfo, most_n: int, *, default_tokens: int | None = None
) -> GenerationRequest:
    """A request to ``/v1/completions``; one that names no end gets ``default_tokens`` at most, None for as many as at OpenAI.

    Raises ApiError (400) that names the parameter.
    """
    unknown = fields.check(body, "completions")
    body = reader.with_defaults(body)
    grammar = _grammar(body, None, reader.dialect)
    prompts, texts = _prompts(body.get("prompt"), reader, info)
    logprobs, is_echo = body.get("logprobs"), bool(body.get("echo"))
    best_of, n = body.get("best_of"), body.get("n") or 1
    if best_of is not None and best_of != n:
        raise unsupported("best_of", f"best_of is {best_of}; this server makes n choices ({n}) and ranks none")
    if body.get("max_tokens") == 0 and not is_echo:
        raise wrong("max_tokens", "max_tokens is 0, which only echo makes sense of; it must be at least 1")
    most = _room(prompts, body.get("max_tokens"), default_tokens or COMPLETION_TOKENS, info, "prompt", "max_tokens")
    most = _scored(most, body, prompts, logprobs, "max_tokens", is_echo=is_echo)
    shared = _shared(body, info, most, most_n, logprobs, grammar)
    if is_echo:
        shared["sampling"] = replace(shared["sampling"], prompt_logprobs=logprobs)
    return GenerationRequest(
        kind="completions",
        prompts=tuple(prompts),
        texts=tuple(texts),
        is_echo=is_echo,
        logprobs=logprobs,
        **shared,
        unknown=tuple(unknown),
    )


def _tools(body: Mapping[str, Any]) -> Tools | None:
    """What may be called; None for nothing. Raises ApiError (400)."""
    is_parallel = body.get("parallel_tool_calls") is not False
    try:
        tools = read_tools(body.get("tools"), body.get("tool_choice"), is_parallel=is_parallel)
    except FieldError as error:
        raise of_field(error) from None
    return tools if tools.offered and tools.choice != "none" else None


def _shared(
    body: Mapping[str, Any],
    info: EngineInfo,
    most: int,
    most_n: int,
    logprobs: int | None,
    grammar: dict[str, Any] | None,
) -> dict[str, Any]:
    """What both endpoints have."""
    stream = bool(body.get("stream"))
    options = body.get("stream_options")
    if options is not None:
        if not stream:
            raise wrong("stream_options", "stream_options needs stream to be true")
        fields.only(options, "stream_options", {"include_usage": fields.BOOL, "include_obfuscation": fields.BOOL})
    try:
        info.check_streams(body.get("num_streams"))
    except InputError as error:
        raise wrong("num_streams", str(error)) from None
    rewires = _rewires(body.get("rewire"), info)
    stop = body.get("stop") or ()
    if isinstance(rewires, Rewires):
        # The engine knows of no texts that end a choice.
        rewires = replace(rewires, may_be_cut=bool(stop))
    n = body.get("n") or 1
    if n > most_n:
        raise wrong("n", f"n is {n}; this server makes at most {most_n} choices")
    return {
        "model": body["model"],
        "n": n,
        "max_tokens": most,
        "sampling": _sampling(body, info, most, logprobs, grammar),
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
        "is_stream": stream,
        "has_usage": bool((options or {}).get("include_usage")),
        "is_routing": bool(body.get("routing")),
        "priority": body.get("priority") or 0,
        "cache_salt": body.get("cache_salt") or "",
        "num_streams": body.get("num_streams"),
        **_depth(body, info, logprobs),
        "rewires": rewires,
        "task": body.get("task"),
        "query": body.get("query"),
    }


def _rewires(wanted: bool | dict[str, Any] | None, info: EngineInfo) -> bool | Rewires:
    """Whether its routers are turned, and how. Raises ApiError (400)."""
    try:
        info.check_rewire(wanted)
    except InputError as error:
        raise wrong("rewire", str(error)) from None
    if not isinstance(wanted, dict):
        return bool(wanted)
    fields.only(wanted, "rewire", fields.REWIRE_FIELDS)
    # To JSON 1 and 1.0 are one number.
    numbers = {name for name, schema in SETTINGS.items() if schema.get("type") == "number"}
    said_there = {name: value for name, value in wanted.items() if value is not None}
    return Rewires.of({name: float(value) if name in numbers else value for name, value in said_there.items()})


def _depth(body: Mapping[str, Any], info: EngineInfo, logprobs: int | None) -> dict[str, Any]:
    """Which blocks it runs, and how deep routers go for it. Raises ApiError (400)."""
    wanted, control = body.get("depth"), body.get("depth_control")
    try:
        info.check_depth(wanted)
    except InputError as error:
        raise wrong("depth", str(error)) from None
    depth = info.depth if wanted is None else wanted
    try:
        info.check_depth_control(depth, control)
    except InputError as error:
        raise wrong("depth_control", str(error)) from None
    # A prompt of which parts are passed over has no experts, or likelihood, of each token.
    is_whole = bool(body.get("routing")) or (bool(body.get("echo")) and logprobs is not None)
    if depth == "pruned" and is_whole:
        if wanted is not None:
            raise wrong(
                "depth", "depth is 'pruned', which goes with neither routing nor the logprobs of echo; leave these out"
            )
        depth = "full"
    return {"depth": tuple(depth) if isinstance(depth, list) else depth, "depth_control": control}


def _sampling(
    body: Mapping[str, Any], info: EngineInfo, most: int, logprobs: int | None, grammar: dict[str, Any] | None
) -> Sampling:
    given = {name: body[name] for name in _TO_SAMPLING if body.get(name) is not None}
    bias = tuple((int(token), float(value)) for token, value in (body.get("logit_bias") or {}).items())
    ends = tuple(body.get("stop_token_ids") or ())
    for name, tokens in (("logit_bias", [token for token, _ in bias]), ("stop_token_ids", ends)):
        for token in tokens:
            if token >= info.vocab_size:
                raise wrong(name, f"{name} has token {token}; the vocabulary has {info.vocab_size:,}")
    if given.get("min_tokens", 0) > most:
        raise wrong("min_tokens", f"min_tokens is {given['min_tokens']}, more than the {most:,} there can be")
    seed = body.get("seed")
    return Sampling(
        **given,
        max_tokens=most,
        top_k=max(0, body.get("top_k") or 0),
        seed=None if seed is None else seed % fields.INT64,
        logit_bias=bias,
        stop_tokens=ends,
        logprobs=logprobs,
        grammar=grammar,
    )


def _grammar(body: Mapping[str, Any], tools: Tools | None, dialect: Dialect) -> dict[str, Any] | None:
    """The schema the output has to follow; the engine refuses one it cannot follow. Raises ApiError (400)."""
    form, param = _demanded(body, tools, dialect)
    if form is not None:
        try:
            key_of(form)
        except InputError as error:
            raise wrong(param, str(error)) from None
    return form


def _demanded(body: Mapping[str, Any], tools: Tools | None, dialect: Dialect) -> tuple[dict[str, Any] | None, str]:
    """The schema, and the field of the request that it is from."""
    form = body.get("response_format") or {"type": "text"}
    kind = form.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise wrong_field("response_format.type", f"is {said(kind)}; it must be text, json_object or json_schema")
    if tools is not None and tools.is_demanded:
        if kind != "text":
            raise unsupported_field("response_format", "cannot be had together with a call that is demanded")
        try:
            return tools.grammar(dialect), "tools"
        except InputError as error:
            raise unsupported("tool_choice", str(error)) from None
    if kind == "text":
        return None, "response_format"
    if kind == "json_object":
        return {}, "response_format"
    table = form.get("json_schema")
    if not isinstance(table, dict) or not isinstance(table.get("schema"), dict):
        raise wrong_field("response_format.json_schema", "must be an object with name and schema")
    return table["schema"], "response_format"


def _room(
    prompts: Sequence[tuple[int, ...]],
    wanted: int | None,
    default: int | None,
    info: EngineInfo,
    param: str,
    asked: str,
) -> int:
    """Most new tokens; ``asked`` is the field that says ``wanted``, ``param`` the prompt's.

    Raises ApiError (400, ``context_length_exceeded``) if prompt and answer do not fit the model.
    """
    longest = max(map(len, prompts))
    room = info.max_positions - longest
    if room < (wanted != 0) or (wanted or 0) > room:
        has = f"the model reads {info.max_positions:,} tokens"
        if wanted and room >= 1:
            what = f"is {wanted:,}, but {has}, and the prompt has {longest:,}"
            raise wrong_field(asked, what, "context_length_exceeded")
        raise wrong(param, f"{has}, but the prompt has {longest:,}", "context_length_exceeded")
    return wanted if wanted is not None else min(room, default) if default else room


def _scored(
    most: int,
    body: Mapping[str, Any],
    prompts: Sequence[tuple[int, ...]],
    logprobs: int | None,
    asked: str,
    *,
    is_echo: bool,
) -> int:
    """Most new tokens of which the log probabilities have room in the answer: ``most``, or fewer where the request names no number.

    A stream has its tokens one after the other, and room for any number. Raises ApiError (400, ``too_many_scores``) that names ``echo`` or
    the field ``asked``.
    """
    if logprobs is None:
        return most
    n, each = body.get("n") or 1, 1 + logprobs
    of_prompts = sum(map(len, prompts)) * n * each if is_echo else 0
    if of_prompts > MOST_SCORES:
        what = f"asks for {of_prompts:,} log probabilities of prompts; there may be {MOST_SCORES:,} at a time"
        raise wrong_field("echo", f"{what}; send fewer prompts, or ask for fewer logprobs", "too_many_scores")
    room = (MOST_SCORES - of_prompts) // (each * n * len(prompts))
    if most <= room or body.get("stream"):
        return most
    if body.get(asked) is None and room:
        return room
    told = of_prompts + most * each * n * len(prompts)
    what = f"asks for up to {told:,} log probabilities in one answer; there may be {MOST_SCORES:,}"
    raise wrong_field(asked, f"{what}; ask for fewer tokens or logprobs, or for a stream", "too_many_scores")


def _prompts(prompt: Any, reader: Reader, info: EngineInfo) -> tuple[list[tuple[int, ...]], list[str]]:
    """Token ids and text of each prompt."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(is_int(part) for part in prompt)):
        # One text, or the tokens of one prompt, however long.
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt or len(prompt) > MOST_PROMPTS:
        what = f"text, a list of 1 to {MOST_PROMPTS} texts, or lists of token ids"
        raise wrong("prompt", f"prompt is {said(prompt)}; it must be {what}")
    made, texts = [], []
    for at, part in enumerate(prompt):
        if isinstance(part, str):
            made.append(reader.encode(part))
            texts.append(part)
        elif isinstance(part, list) and part and all(is_int(token) and 0 <= token < info.vocab_size for token in part):
            made.append(tuple(part))
            texts.append(reader.decode(part))
        else:
            what = f"text, or a list of token ids from 0 to {info.vocab_size - 1:,}"
            raise wrong(f"prompt[{at}]", f"prompt[{at}] is {said(part)}; it must be {what}")
    if not all(made):
        raise wrong("prompt", "prompt is empty, and the model has no token for a beginning")
    return made, texts


def check_model(body: Mapping[str, Any], names: Sequence[str], *, is_needed: bool = True) -> None:
    """Raises ApiError: 400 if no model is named, 404 if it is another."""
    name = body.get("model")
    if name is None and not is_needed:
        return
    known = ", ".join(map(repr, names))
    if not isinstance(name, str) or not name:
        raise wrong("model", f"model is {said(name)}; it must be {known} (GET /v1/models)")
    if name not in names:
        shown = name[:80] if name.isprintable() else "?"
        raise ApiError(404, "model_not_found", f"there is no model {shown!r}; this server has {known}", param="model")
