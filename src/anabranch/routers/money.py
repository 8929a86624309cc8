"""Money is integers: nano-dollars (10^-9 US dollars), so that sums are exact and limits are never passed by rounding."""

from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from typing import Self

from anabranch.bounds import shown
from anabranch.config import Config, Field, configclass
from anabranch.errors import InputError

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


@configclass
class Price(Config):
    """What a model's tokens cost, in nano-dollars per million tokens (0.20 dollars per million is 200,000,000).

    Attributes:
        input: a million prompt tokens.
        output: a million completion tokens.
        cached_input: a million prompt tokens that the provider had cached; None if they cost what others do.
    """

    input: int = Field(default=0, ge=0)
    output: int = Field(default=0, ge=0)
    cached_input: int | None = Field(default=None, ge=0)

    @classmethod
    def of_dollars(cls, input: float | str, output: float | str, cached_input: float | str | None = None) -> Self:
        """From dollars per million tokens, the way price lists are written."""
        cached = None if cached_input is None else nano_dollars(cached_input)
        return cls(input=nano_dollars(input), output=nano_dollars(output), cached_input=cached)

    def cost(self, prompt: int, completion: int, cached: int = 0) -> int:
        """Nano-dollars of a call, rounded up.

        Args:
            prompt: prompt tokens, the cached ones among them.
            completion: completion tokens.
            cached: prompt tokens the provider had cached.
        """
        if not 0 <= cached <= prompt or completion < 0:
            raise InputError(
                f"{prompt} prompt tokens, {cached} of them cached, and {completion} completion tokens cannot be"
            )
        cheap = self.input if self.cached_input is None else self.cached_input
        return -(-((prompt - cached) * self.input + cached * cheap + completion * self.output) // PER)
