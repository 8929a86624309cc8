"""What an engine is asked and what it answers: plain values that travel through pipes.

A front end makes a `Request` of tokens; the engine gives back `Output`s of tokens until one says why it ended. Text, chat templates
and choices (``n``) are the front end's: a request of n choices is n requests, which share their prompt through the prefix cache.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Integral, Real
from typing import Any

from anabranch.bounds import MOST_SIZE, shown
from anabranch.errors import InputError
from anabranch.serving.core.mixture import Mixture, check_mixture, pairs_of
from anabranch.serving.core.rewires import Rewires

_MAY_BE_NONE = ("seed", "logprobs", "prompt_logprobs")
_WHOLE = ("max_tokens", "min_tokens", "top_k", *_MAY_BE_NONE)
_MOST_BIAS = 1e30
POOLINGS = ("last", "mean")
# Of a token: {layer: destinations}, and of routers beside matrices {matrix: adapters}, by name.
Route = dict[int | str, tuple[int | str, ...]]


class Finish(StrEnum):
    """Why a request ended."""

    # A stop token or string.
    STOP = "stop"
    # max_tokens or the model's positions.
    LENGTH = "length"
    # The client has gone, or asked for it.
    ABORT = "abort"
    # It could not go on, alone or with the whole engine (`Output.engine_failed`); `Output.error` says why.
    ERROR = "error"


def _is_real(value: Any) -> bool:
    return isinstance(value, Real)


def _plain(value: Any) -> Any:
    """A number of Python's for one of numpy's or torch's, whose arithmetic overflows or gives arrays; anything else as it is."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return value


def _tokens(value: Any) -> Any:
    """A tuple of Python's integers where it is a list of tokens in any form, else the value as it is."""
    if getattr(value, "shape", None) and callable(getattr(value, "tolist", None)):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(value) if _are_tokens(value) else tuple(map(_plain, value))
    return value


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list | tuple) and set(map(type, value)) <= {int}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preamble:
    """What may come before the output that a grammar holds for: reasoning, which is free.

    Attributes:
        open: the tokens that begin it, where the output may also begin at once; none where it has begun before the output.
        close: texts one of which ends it, special tokens among them by their names.
    """

    open: tuple[int, ...] = ()
    close: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.close or not all(isinstance(text, str) and text for text in self.close):
            raise InputError(f"close is {shown(self.close)}; it must have texts, or a preamble would never end")
        if not _are_tokens(self.open):
            raise InputError(f"open is {shown(self.open)}; it must be a tuple of token ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token of one request is chosen. Numbers of numpy and torch are taken as Python's.

    Attributes:
        max_tokens: most new tokens; 0 computes the prompt and no more.
        min_tokens: stop tokens are not taken before so many.
        temperature: 0 takes the most likely token.
        top_p: sample among the most likely whose probabilities reach it.
        top_k: sample among the k most likely; 0 among all.
        min_p: leave out tokens less likely than this share of the most likely.
        seed: of this request's own generator; None draws one. With a seed the tokens do not depend on other requests.
        presence_penalty: taken from the logits of tokens that were generated.
        frequency_penalty: the same, times how often.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output (CTRL, arXiv 1909.05858).
        logit_bias: (token, added logit) pairs; -inf forbids a token, and beyond 1e30 is as 1e30.
        stop_tokens: ids that end the request; they are not part of the result.
        ignore_eos: the model's own end-of-text tokens do not end it.
        logprobs: None for none, else how many of the most likely tokens to tell beside the chosen one (0 to 20).
        prompt_logprobs: the same for the prompt's own tokens from the second on, see `Output.prompt_logprobs`. The whole prompt is
            then computed, whatever the prefix cache has of it.
        grammar: what the output must be: a JSON schema as a dict, {} for any JSON object, None for free text (`anabranch.serving.grammar`).
        preamble: what may come before the output that the grammar is of; None for nothing.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: dict[str, Any] | None = None
    preamble: Preamble | None = None

    def __post_init__(self) -> None:
        for name in _WHOLE:
            value = self._made_plain(name, _plain)
            if not isinstance(value, int) and (value is not None or name not in _MAY_BE_NONE):
                raise InputError(f"{name} is {value!r}; it must be a whole number")
        for name, low, high in (
            ("max_tokens", 0, MOST_SIZE),
            ("min_tokens", 0, MOST_SIZE),
            ("temperature", 0, 100),
            ("top_p", 0, 1),
            ("top_k", 0, MOST_SIZE),
            ("min_p", 0, 1),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
            ("repetition_penalty", 0.01, 100),
        ):
            value = self._made_plain(name, _plain)
            if not _is_real(value) or not low <= value <= high:
                raise InputError(f"{name} is {shown(value)}; it must be {low} to {high}")
            self._made_plain(name, int if name in _WHOLE else float)
        for name in ("logprobs", "prompt_logprobs"):
            told = getattr(self, name)
            if told is not None and not 0 <= told <= 20:
                raise InputError(f"{name} is {told}; it must be 0 to 20")
        if not isinstance(self._made_plain("ignore_eos", _plain), int):
            raise InputError(f"ignore_eos is {shown(self.ignore_eos)}; it must be True or False")
        if self.grammar is not None and not isinstance(self.grammar, dict):
            raise InputError(f"grammar is {shown(self.grammar)}; it must be a JSON schema, which is an object, or None")
        if self.preamble is not None and not isinstance(self.preamble, Preamble):
            raise InputError(f"preamble is {shown(self.preamble)}; it must be a Preamble or None")
        if not _are_tokens(self._made_plain("stop_tokens", _tokens)):
            raise InputError(f"stop_tokens is {shown(self.stop_tokens)}; it must be a tuple of token ids")
        self._made_plain("logit_bias", _biases)

    def _made_plain(self, name: str, make: Callable[[Any], Any]) -> Any:
        """What ``make`` gives for a field, which is its value from now on."""
        object.__setattr__(self, name, make(getattr(self, name)))
        return getattr(self, name)


def _biases(pairs: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of a token and what is added to its logit. Raises InputError."""
    if not isinstance(pairs, list | tuple):
        raise InputError(f"logit_bias is {shown(pairs)}; it must be pairs of a token and a number")
    made = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"logit_bias has {shown(pair)}; it must be pairs of a token and a number")
        token, value = map(_plain, pair)
        if not isinstance(token, int):
            raise InputError(f"logit_bias names {shown(token)}; a token is a whole number")
        if not _is_real(value) or value != value or value == math.inf:
            raise InputError(f"logit_bias has the value {shown(value)}; it must be a number, or -inf to forbid a token")
        # Beyond float's largest it is as 1e30 all the same.
        made.append((int(token), float(max(-_MOST_BIAS, min(value, _MOST_BIAS))) if value != -math.inf else -math.inf))
    return tuple(made)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to continue.

    Attributes:
        id: unique among the requests under way.
        prompt: token ids, at least one.
        sampling: how to choose.
        priority: lower numbers go first.
        own_priority: the same among the requests of one key that wait, and of no account to those of others.
        key: whose it is (an API key's name), for fairness.
        arrival: when it came, seconds of `time.monotonic`.
        cache_salt: requests share prefixes only with those of the same salt.
        options: what changes the keys and values or the route (adapter, allowed experts, depth): part of the prefix cache's key. Who is
            overridden by a hook names there what the hook does, as ``("routing", name)``; see `OverrideHook`.
        record_routing: tell which experts each token went to, see `Output.routing`.
        num_streams: parallel streams, of a model that has them; None for the engine's number.
        path: the blocks to run, in order, instead of each once, see `Decoder.forward`; at most as many as the engine keeps keys and values
            of (`ServingConfig.max_depth`).
        routes_depth: let the engine's depth routers choose the path by the prompt, see `anabranch.serving.depth`; its prefix is not
            shared. The path is told with the first output (`Output.path`).
        depth_control: how deep they go for it, as `DepthConfig.control`; None for the engine's. Whatever it says, no more blocks run than
            the engine keeps keys and values of.
        rewires: let the routers of its experts be turned to its text, before it begins and while it goes on, see
            `anabranch.adapters.rewiring`; where the engine does that (`ServingConfig.rewiring`). `Rewires`, or a mapping that it is made
            of, for one that brings settings or vectors of its own, or wants these back.
        turn_every: new tokens after each of which nothing is computed for it until it is told to go on; for the engine alone.
        skips_tokens: let blocks pass over tokens of the prompt as the engine's skipper decides by it, see `anabranch.serving.depth`; its
            prefix is not shared. What each block computed is told with the first output (`Output.computed`).
        pooling: make a vector of the prompt (`Output.embedding`) of the model's last states, after the norm: that of the ``last`` token, or
            their ``mean``, for which the whole prompt is computed; it makes no tokens (`Sampling.max_tokens` is 0). None makes none.
        adapters: names and weights of the adapters, and routers over several, that are added up for it; none for the base. A name, or a
            mapping, is taken too.
        task: name of its task, where the model or what is added goes by tasks; None for none.
        query: what it asks for, in words: what its routers compare with the instructions of their adapters, or the writer of a pool makes
            an instruction of. None, beside no ``instruction``, for token by token alone.
        instruction: what they compare in the place of that, as it is.
        bound: what the engine has found for ``adapters``; for the engine alone.
        buffer: outputs that wait for its reader before it is paused; None for `core.stream.BUFFER`.
        stall_s: seconds that its reader may leave it paused before it is ended; None for `core.stream.STALL_S`, infinity for no end.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0
    own_priority: int = 0
    key: str = ""
    arrival: float = 0.0
    cache_salt: str = ""
    options: tuple[tuple[str, str], ...] = ()
    record_routing: bool = False
    num_streams: int | None = None
    path: tuple[int, ...] | None = None
    routes_depth: bool = False
    depth_control: float | None = None
    skips_tokens: bool = False
    rewires: bool | Rewires = False
    turn_every: int | None = None
    pooling: str | None = None
    adapters: Mixture = ()
    task: str | None = None
    query: str | None = None
    instruction: str | None = None
    bound: Any = field(default=None, repr=False, compare=False)
    buffer: int | None = None
    stall_s: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", pairs_of(self.adapters))
        object.__setattr__(self, "prompt", _tokens(self.prompt))
        object.__setattr__(self, "path", _tokens(self.path))
        if isinstance(self.rewires, Mapping):
            object.__setattr__(self, "rewires", Rewires.of(self.rewires))
        for name in ("num_streams", "depth_control"):
            object.__setattr__(self, name, _plain(getattr(self, name)))

    @property
    def shares_prefix(self) -> bool:
        """Whether what is stored of it depends on what comes before in it alone: routers and skippers look at the whole prompt."""
        return not (self.routes_depth or self.skips_tokens)

    def check_fields(self) -> None:
        """Raises InputError for a field that the queue or the prefix cache cannot take: there it would end the engine for everybody."""
        for name in ("id", "key", "cache_salt"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise InputError(f"{name} is {shown(value)}; it must be text")
        for name in ("task", "query", "instruction"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InputError(f"{name} is {shown(value)}; it must be text, or None")
        if not isinstance(self.prompt, tuple) or not _are_tokens(self.prompt):
            raise InputError(
                f"the prompt is {shown(self.prompt)}; it must be a tuple of token ids, which are whole numbers"
            )
        if not isinstance(self.sampling, Sampling):
            raise InputError(f"sampling is {shown(self.sampling)}; it must be a Sampling")
        for name in ("priority", "own_priority", "arrival"):
            value = getattr(self, name)
            if not _is_real(value) or value != value:
                raise InputError(f"{name} is {shown(value)}; it must be a number")
        if self.pooling not in (None, *POOLINGS):
            raise InputError(f"pooling is {shown(self.pooling)}; it must be one of {', '.join(POOLINGS)}, or None")
        if self.pooling is not None and self.sampling.max_tokens:
            raise InputError(f"pooling makes no tokens; max_tokens is {self.sampling.max_tokens}, and must be 0")
        for name in ("routes_depth", "skips_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {shown(getattr(self, name))}; it must be True or False")
        check_mixture(self.adapters)
        pairs = self.options if isinstance(self.options, tuple | list) else [self.options]
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
                raise InputError(f"options has {shown(pair)}; it must have pairs of texts, such as ('adapter', 'a')")

    def check_room(self, max_positions: int) -> None:
        """Raises InputError unless the prompt has tokens and fits in ``max_positions``, with a new token if one is asked for."""
        if not self.prompt:
            raise InputError("the prompt has no tokens; it must have at least one")
        if len(self.prompt) + min(1, self.sampling.max_tokens) > max_positions:
            new = "with one new token it" if self.sampling.max_tokens else "it"
            raise InputError(f"the prompt has {len(self.prompt)} tokens; {new} must fit in {max_positions}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token's natural log probability, and the most likely (token, log probability) pairs, best first.

    They are the model's own: of its logits before penalties, bias, grammar and temperature.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, kw_only=True)
class Output:
    """News of one request.

    Attributes:
        id: the request's.
        tokens: new tokens since the last output.
        logprobs: one for each of them where asked for.
        finish: why it ended; None while it goes on. After one with a reason there are no more.
        error: what went wrong, with `Finish.ERROR`.
        engine_failed: the engine failed, and this request with it; False where it failed alone, and the others go on.
        cached_tokens: prompt tokens whose keys and values were there already when its first chunk ran; set with the first output alone,
            wherever the request goes on.
        queue_s: seconds it waited before its first chunk ran; set with the first output.
        routing: where recorded, for each new token {layer: destinations}, and of routers that it asked for {matrix: adapters}, by name.
        explained: where that is recorded, by the name of each pool of adapters that it asked for: what was compared, and what speaks for
            the adapters that were used most, over all its new tokens so far; see `anabranch.serving.engine.explained`.
        prompt_logprobs: where asked for, of the prompt's next tokens since the last output; the first is of the second token, as nothing
            comes before the first. All are told before the first new token, or with it, and each once.
        embedding: the vector of the prompt, where asked for; with the last output.
        path: the blocks that it runs, where depth routers have chosen them, or those of new tokens, where blocks pass over tokens of the
            prompt; with the first output that has something of the model.
        computed: there, how many tokens of the prompt each block has computed; likewise.
        is_prepared: where it has to wait for more than the engine: False as what it needs (adapters, a grammar) begins to be made ready or
            to wait for room, True once that is there. Both come before all else, with nothing but that.
        rewiring: where routers are turned to its text, a report of each time since the last output: the fields of
            `anabranch.adapters.rewiring.Phase`.
        rewire_state: there, where asked for, the vectors that its tokens have from this output on: what `Rewires.state` takes, so that a
            conversation goes on; with the last output, see also `Rewires.may_be_cut`.
    """

    id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    error: str | None = None
    engine_failed: bool = False
    cached_tokens: int | None = None
    queue_s: float | None = None
    routing: tuple[Route, ...] = ()
    explained: dict[str, Any] = field(default_factory=dict)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    embedding: tuple[float, ...] = ()
    path: tuple[int, ...] | None = None
    computed: tuple[int, ...] | None = None
    rewiring: tuple[dict[str, Any], ...] = ()
    rewire_state: dict[str, Any] | None = None
    is_prepared: bool | None = None

    @property
    def is_bare(self) -> bool:
        """Whether it says nothing but whether the request is prepared."""
        return self.is_prepared is not None and self == Output(id=self.id, is_prepared=self.is_prepared)
