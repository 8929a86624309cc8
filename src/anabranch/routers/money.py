"""Money is integers: nano-dollars (10^-9 US dollars), so that sums are exact and limits are never passed by rounding."""

from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from operator import attrgetter
from typing import Self

from anabranch.bounds import shown
from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError, InputError

# Nano-dollars in a dollar.
NANO = 10**9

# A price is for so many tokens.
PER = 10**6

# Nano-dollars of one amount, be it a limit, a price or what a request may cost: nine million dollars.
MOST_NANO = 2**53


def nano_dollars(dollars: float | str | Decimal) -> int:
    """Dollars as nano-dollars, to the nearest. Raises InputError for what is no number, or more than nine million."""
    try:
        value = Decimal(str(dollars))
        is_amount = value.is_finite()
    except (InvalidOperation, ValueError):
        # The latter of an integer of thousands of digits.
        is_amount = False
    if not is_amount:
        raise InputError(f"{shown(dollars)} is no amount of dollars; write a number such as 0.25")
    # Compared before anything is computed with it, which of 1e999999 would take long, or fail.
    if value.copy_abs() > MOST_NANO // NANO:
        raise InputError(f"{shown(dollars)} is no amount of dollars; it must be at most {MOST_NANO // NANO:,}")
    return int((value * NANO).to_integral_value(rounding=ROUND_HALF_EVEN))


def dollars(nano: int) -> float:
    """Nano-dollars as dollars, for showing."""
    return nano / NANO


def in_full(nano: int) -> str:
    """Nano-dollars as dollars to the last digit, at least to the cent: two amounts that differ are never written alike."""
    whole, rest = divmod(abs(nano), NANO)
    return f"{'-' if nano < 0 else ''}${whole:,}.{f'{rest:09d}'.rstrip('0').ljust(2, '0')}"


# Words of a request, and of an answer, for the tier that a price list means where it names none.
STANDARD = frozenset({"", "auto", "default", "standard", "standard_only", "on_demand", "performance"})

# Tiers that no provider bills at more than its standard one: without a price of their own they cost what that does.
CHEAPER = frozenset({"flex", "batch"})


@configclass
class Price(Config):
    """What a model costs, in nano-dollars per million tokens (0.20 dollars per million is 200,000,000).

    Attributes:
        input: a million prompt tokens.
        output: a million completion tokens.
        cached_input: a million prompt tokens that the provider had cached; None if they cost what others do.
        cache_write: a million prompt tokens that the provider puts into its cache, for minutes; None for 5/4 of ``input``, which is what
            Anthropic bills for five minutes.
        cache_write_1h: likewise for an hour; None for twice ``input``, or ``cache_write`` where that is more.
        audio_input, audio_output: a million tokens of sound; None if it has no price of its own.
        image_input, image_output: likewise of pictures.
        web_search: a thousand searches of the web that the provider makes for an answer; None if they have no price.
        request: a thousand calls, beside their tokens.
        tiers: prices of service tiers other than the standard one (``priority``, ``flex``, ``batch``, ``fast``), by name. What they do
            not name of sound, pictures, searches and calls costs what it does in the standard tier.
        long_context: prompt tokens above which all of a call is priced as ``long`` says; None for never.
        long: see ``long_context``.
    """

    input: int = Field(default=0, ge=0)
    output: int = Field(default=0, ge=0)
    cached_input: int | None = Field(default=None, ge=0)
    cache_write: int | None = Field(default=None, ge=0)
    cache_write_1h: int | None = Field(default=None, ge=0)
    audio_input: int | None = Field(default=None, ge=0)
    audio_output: int | None = Field(default=None, ge=0)
    image_input: int | None = Field(default=None, ge=0)
    image_output: int | None = Field(default=None, ge=0)
    web_search: int | None = Field(default=None, ge=0)
    request: int = Field(default=0, ge=0)
    tiers: dict[str, "Price"] = Field(default_factory=dict)
    long_context: int | None = Field(default=None, ge=1)
    long: "Price | None" = None

    def __post_init__(self) -> None:
        if (self.long_context is None) != (self.long is None):
            raise ConfigError("long_context and long go together; give both or neither")
        inner = next((name for name, tier in self.tiers.items() if tier.tiers), None)
        if inner is not None:
            raise ConfigError(f"tiers.{inner} has tiers of its own; a tier has none")
        if self.long is not None and self.long.tiers:
            raise ConfigError("long has tiers of its own; put long_context and long into the tier")
        # The fields of a frozen dataclass are set once, here.
        object.__setattr__(self, "tiers", {name: self._filled(tier) for name, tier in self.tiers.items()})
        object.__setattr__(self, "long", None if self.long is None else self._filled(self.long))

    def _filled(self, other: "Price") -> "Price":
        """A price of a tier, or of long prompts, with what it does not name as it is here, where that does not go with its tokens."""
        rates = {name: getattr(self, name) for name in INHERITED if getattr(other, name) is None}
        changes = {name: rate for name, rate in rates.items() if rate is not None}
        if self.request and not other.request:
            changes["request"] = self.request
        return other.replace(**changes) if changes else other

    def __hash__(self) -> int:
        return hash((self.input, self.output, self.cached_input, self.cache_write, self.request, self.long_context))

    @classmethod
    def of_dollars(cls, input: float | str, output: float | str, cached_input: float | str | None = None) -> Self:
        """From dollars per million tokens, the way price lists are written."""
        cached = None if cached_input is None else nano_dollars(cached_input)
        return cls(input=nano_dollars(input), output=nano_dollars(output), cached_input=cached)

    @property
    def is_free(self) -> bool:
        """Nothing costs anything."""
        rates = (getattr(self, name) for name in (*TOKEN_RATES, "web_search", "request"))
        inner = [*self.tiers.values(), *([self.long] if self.long is not None else [])]
        return not any(rates) and all(price.is_free for price in inner)

    def of_tier(self, name: str) -> "Price | None":
        """The price of a service tier; None if it has none and may cost more than the standard one."""
        found = self.tiers.get(name)
        if found is not None:
            return found
        return self if name in STANDARD or name in CHEAPER or self.is_free else None

    def all_tiers(self) -> "tuple[Price, ...]":
        """The standard price and those of all tiers."""
        return (self, *self.tiers.values())

    def at(self, prompt: int) -> "Price":
        """The price of a call with so many prompt tokens."""
        if self.long is None or self.long_context is None or prompt <= self.long_context:
            return self
        return self.long.at(prompt)

    def cost(self, prompt: int, completion: int, cached: int = 0) -> int:
        """Nano-dollars of a call of plain text, rounded up.

        Args:
            prompt: prompt tokens, the cached ones among them.
            completion: completion tokens.
            cached: prompt tokens the provider had cached.
        """
        if not 0 <= cached <= prompt or completion < 0:
            raise _impossible(prompt, completion, cached)
        # What `cost_of` comes to, for strategies that ask this of every model for every request.
        price = self.at(prompt)
        cheap = price.input if price.cached_input is None else price.cached_input
        nano = (prompt - cached) * price.input + cached * cheap + completion * price.output
        return -(-(nano + 1000 * price.request) // PER)

    def cost_of(self, tokens: "Tokens", searches: int = 0, calls: int = 1) -> int:
        """Nano-dollars of a call, rounded up; of the tier that this is the price of. It is billed as so many ``calls``.

        Where parts of a prompt overlap (sound that was cached), each token counts once, at the dearest that it may be.
        """
        if not any(parts := _parts_of(tokens)):
            if min(tokens.prompt, tokens.completion, searches, calls) < 0:
                raise _impossible(tokens.prompt, tokens.completion, tokens.cached)
            # Plain text, as most is.
            price = self.at(tokens.prompt)
            nano = tokens.prompt * price.input + tokens.completion * price.output
            return -(-(nano + 1000 * ((price.web_search or 0) * searches + price.request * calls)) // PER)
        if tokens.cached > tokens.prompt or tokens.completion < 0 or min(searches, calls, *parts) < 0:
            raise _impossible(tokens.prompt, tokens.completion, tokens.cached)
        price = self.at(tokens.prompt)
        written = price.input + -(-price.input // 4) if price.cache_write is None else price.cache_write
        written_1h = max(2 * price.input, written) if price.cache_write_1h is None else price.cache_write_1h
        sound = price.input if price.audio_input is None else price.audio_input
        picture = price.input if price.image_input is None else price.image_input
        cached = price.input if price.cached_input is None else price.cached_input
        inputs = [
            (tokens.audio_input, sound),
            (tokens.image_input, picture),
            (tokens.cache_write_1h, written_1h),
            (tokens.cache_write, written),
            (tokens.cached, cached),
        ]
        outputs = [
            (tokens.audio_output, price.output if price.audio_output is None else price.audio_output),
            (tokens.image_output, price.output if price.image_output is None else price.image_output),
        ]
        nano = _dearest(tokens.prompt, inputs, price.input) + _dearest(tokens.completion, outputs, price.output)
        counted = 1000 * ((price.web_search or 0) * searches + price.request * calls)
        return -(-(nano + counted) // PER)


def _impossible(prompt: int, completion: int, cached: int) -> InputError:
    return InputError(f"{prompt} prompt tokens, {cached} of them cached, and {completion} completion tokens cannot be")


def _dearest(whole: int, parts: "list[tuple[int, int]]", rate: int) -> int:
    """So many tokens of which parts have rates of their own, the dearest first; the rest, and no part of nothing, at ``rate``."""
    total = 0
    for count, own in sorted(parts, key=lambda part: -part[1]):
        taken = min(count, whole)
        total, whole = total + taken * own, whole - taken
    return total + whole * rate


# Rates of a standard price that hold in its tiers too, where those name none.
INHERITED = ("audio_input", "audio_output", "image_input", "image_output", "web_search")

# Parts of `Tokens` that have rates of their own.
PARTS = ("cached", "cache_write", "cache_write_1h", "audio_input", "image_input", "audio_output", "image_output")
_parts_of = attrgetter(*PARTS)
TOKEN_RATES = (
    "input",
    "output",
    "cached_input",
    "cache_write",
    "cache_write_1h",
    "audio_input",
    "audio_output",
    "image_input",
    "image_output",
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of a call, by what they cost.

    Attributes:
        prompt: all prompt tokens.
        completion: all completion tokens.
        cached, cache_write, cache_write_1h, audio_input, image_input: prompt tokens of that kind; they may overlap.
        audio_output, image_output: completion tokens of that kind.
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    audio_input: int = 0
    image_input: int = 0
    audio_output: int = 0
    image_output: int = 0
