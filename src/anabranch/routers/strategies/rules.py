"""Rules: the first one whose conditions all hold says where a query goes. No learning; what an operator writes down.

    [strategies.mine]
    kind = "rules"
    [[strategies.mine.rules]]
    name = "code"
    has_code = true
    models = ["big-coder", "medium"]         # in this order; the rest of the pool follows as fallback
    [[strategies.mine.rules]]
    name = "short talk"
    max_tokens = 40
    size = "small"                           # or by size: the cheapest, the middle, the dearest of the pool

Without rules of its own, `DEFAULT` is used, which names sizes only and so fits any pool. Rules with the surface cues of a request
are the first family of the survey (Varangot-Reille et al. 2025, arXiv 2502.00409); what counts as a cue is in `cues`.
"""
# Shapes: P models of the pool

import math
import re
from typing import Any, Literal

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError, InputError
from anabranch.routers.contract.query import Decision, Model, Pool, Query
from anabranch.routers.contract.strategy import Strategy, ordered
from anabranch.routers.strategies import cues
from anabranch.routers.strategies.fixed import USUAL_COMPLETION, USUAL_PROMPT

Size = Literal["small", "medium", "large"]

# Place among the pool's models from cheap to dear.
SIZES = {"small": 0.0, "medium": 0.5, "large": 1.0}

# Where a prompt was not counted.
CHARACTERS_PER_TOKEN = 4


@configclass
class Rule(BaseConfig):
    """Conditions, all of which must hold, and where such queries go. A condition left out always holds.

    Attributes:
        name: told in the reason.
        models: tried in this order; one of ``models`` and ``size`` must be given.
        size: small, medium or large by the price of the pool's models, by parameters where prices are equal.
        min_tokens: least prompt tokens.
        max_tokens: most prompt tokens.
        languages: ISO 639-1 codes, of which the text's is one.
        tasks: of which the query's is one.
        has_code: the text shows code.
        has_maths: the text shows mathematics.
        looks_hard: the text asks for reasoning.
        has_tools: tools are offered.
        has_images: a message carries an image.
        headers: name to regular expression that the whole value must match.
        regex: found in the first 8,000 characters of the text, case ignored.
        tenants: of which the sender is one.
    """

    name: str
    models: tuple[str, ...] = ()
    size: Size | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=None, ge=0)
    languages: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    has_code: bool | None = None
    has_maths: bool | None = None
    looks_hard: bool | None = None
    has_tools: bool | None = None
    has_images: bool | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    regex: str | None = None
    tenants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.models) == (self.size is not None):
            raise ConfigError(f"rule {self.name!r} must say where to: either models or size")
        for pattern in (*self.headers.values(), self.regex or ""):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"rule {self.name!r} has the regular expression {pattern!r}: {error}") from None


DEFAULT = (
    Rule(name="images", has_images=True, size="large"),
    Rule(name="tools", has_tools=True, size="large"),
    Rule(name="code", has_code=True, size="large"),
    Rule(name="mathematics", has_maths=True, size="large"),
    Rule(name="asks for reasoning", looks_hard=True, size="large"),
    Rule(name="long", min_tokens=2000, size="medium"),
    Rule(name="short", max_tokens=60, size="small"),
)


class Rules(Strategy, kind="rules"):
    """The first rule that fits decides; without one, ``otherwise`` does. Models whose context is too short are left out."""

    @configclass
    class Config(Strategy.Config):
        """Rules in order.

        Attributes:
            rules: tried from the first; empty for `DEFAULT`.
            otherwise: size, or name of a model, where none fits.
        """

        rules: tuple[Rule, ...] = ()
        otherwise: str = "medium"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rules: tuple[Rule, ...] = config.rules or DEFAULT
        self._patterns = {
            rule.name: re.compile(rule.regex, re.IGNORECASE) for rule in self.rules if rule.regex is not None
        }

    @property
    def is_fast(self) -> bool:  # type: ignore[override]
        """Unless a rule has a regular expression of the operator's, which may take its time."""
        return not self._patterns and not any(rule.headers for rule in self.rules)

    def route(self, query: Query, pool: Pool) -> Decision:
        """Raises InputError if a rule that fits names no model of the pool, or no model's context is long enough."""
        seen = _Seen(query)
        rule = next((rule for rule in self.rules if self._fits(rule, query, seen)), None)
        size, models, reason = self.config.otherwise, [self.config.otherwise], f"no rule fits: {self.config.otherwise}"
        if rule is not None:
            size, models, reason = rule.size or "", list(rule.models), f"rule {rule.name!r}"
        score_P = _by_size(pool, query, SIZES[size]) if size in SIZES else _by_name(pool, models, reason)
        long_P = [_is_long_enough(model, query, seen.tokens) for model in pool.models]
        if not any(long_P):
            raise InputError(f"the prompt has about {seen.tokens} tokens; no model of the pool takes that many")
        usable_P = [score if is_long else -math.inf for score, is_long in zip(score_P, long_P, strict=True)]
        return Decision(
            candidates=ordered(pool, usable_P),
            strategy=self.name,
            reason=reason,
            details={"rule": None if rule is None else rule.name, "tokens": seen.tokens},
            probability=1.0,
        )

    def _fits(self, rule: Rule, query: Query, seen: "_Seen") -> bool:
        """Conditions from the cheapest to tell to the dearest."""
        if rule.has_tools not in (None, query.has_tools) or rule.has_images not in (None, query.has_images):
            return False
        if rule.tasks and query.task not in rule.tasks:
            return False
        if rule.tenants and query.tenant not in rule.tenants:
            return False
        if rule.min_tokens is not None and seen.tokens < rule.min_tokens:
            return False
        if rule.max_tokens is not None and seen.tokens > rule.max_tokens:
            return False
        for header, pattern in rule.headers.items():
            value = query.headers.get(header.lower())
            if value is None or re.fullmatch(pattern, value) is None:
                return False
        if any(wanted not in (None, seen.cue(name)) for name, wanted in _cues_of(rule)):
            return False
        if rule.languages and seen.language() not in rule.languages:
            return False
        return (
            rule.name not in self._patterns
            or self._patterns[rule.name].search(query.text[: cues.LOOKED_AT]) is not None
        )


def _cues_of(rule: Rule) -> tuple[tuple[str, bool | None], ...]:
    return (("has_code", rule.has_code), ("has_maths", rule.has_maths), ("looks_hard", rule.looks_hard))


class _Seen:
    """What has been found out about one query, each cue at most once."""

    def __init__(self, query: Query) -> None:
        self.text = query.text
        self.tokens = (
            -(-len(query.text) // CHARACTERS_PER_TOKEN) if query.prompt_tokens is None else query.prompt_tokens
        )
        self._cues: dict[str, Any] = {}

    def cue(self, name: str) -> bool:
        """A cue of `cues` by name."""
        if name not in self._cues:
            self._cues[name] = getattr(cues, name)(self.text)
        return self._cues[name]

    def language(self) -> str | None:
        """That of the text."""
        if "language" not in self._cues:
            self._cues["language"] = cues.language(self.text)
        return self._cues["language"]


def _by_name(pool: Pool, models: list[str], reason: str) -> list[float]:
    """The named models first, in their order, then the rest in the pool's."""
    if not any(name in pool.names for name in models):
        raise InputError(f"{reason} names {', '.join(models)}; the pool has {', '.join(pool.names)}")
    return [
        -float(models.index(name)) if name in models else -float(len(models) + at) for at, name in enumerate(pool.names)
    ]


def by_price(pool: Pool, query: Query | None = None) -> np.ndarray:
    """Places of the pool's models from cheap to dear, by parameters where prices are equal."""
    return np.array(_from_cheap_to_dear(pool, query), np.int64)


def _from_cheap_to_dear(pool: Pool, query: Query | None) -> list[int]:
    prompt = USUAL_PROMPT if query is None or query.prompt_tokens is None else query.prompt_tokens
    keys = [
        (model.price.cost(prompt, USUAL_COMPLETION), model.parameters or 0.0, at)
        for at, model in enumerate(pool.models)
    ]
    return [at for *_, at in sorted(keys)]


def _by_size(pool: Pool, query: Query, size: float) -> list[float]:
    """Nearest to the wanted size first; the dearer of two that are as near.

    In plain Python: for a handful of models numpy costs ten times as much, and this is in the way of every request.
    """
    wanted = math.floor(size * (len(pool) - 1))
    score_P = [0.0] * len(pool)
    for rank, at in enumerate(_from_cheap_to_dear(pool, query)):
        score_P[at] = -abs(rank - wanted) + 0.25 * (rank > wanted)
    return score_P


def _is_long_enough(model: Model, query: Query, tokens: int) -> bool:
    return model.context is None or tokens + (query.max_tokens or 0) <= model.context
