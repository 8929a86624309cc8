"""Numbers between bounds, as texts: decimal digits compared one by one."""

from decimal import Decimal

from anabranch.serving.grammar.machine import Machine

__all__ = ["bounded_integer", "bounded_number", "integer", "number"]

_SIGNIFICANT = 15  # decimal digits that a float keeps apart, so that a text beyond a bound is not read as the bound


def integer(machine: Machine) -> int:
    """Any integer, in digits."""
    return machine.sequence(machine.optional(machine.literal(b"-")), _whole(machine))


def number(machine: Machine) -> int:
    """Any number; exponents up to 307, which a float can hold."""
    fraction = machine.sequence(machine.literal(b"."), machine.repeat(_digit(machine), 1))
    exponent = machine.choice(
        machine.repeat(_digit(machine), 1, 2),
        machine.sequence(_digit(machine, 1, 2), _digit(machine), _digit(machine)),
        machine.sequence(machine.literal(b"30"), _digit(machine, 0, 7)),
    )
    power = machine.sequence(machine.one_of(b"eE"), machine.optional(machine.one_of(b"+-")), exponent)
    return machine.sequence(integer(machine), machine.optional(fraction), machine.optional(power))


def bounded_integer(machine: Machine, low: int | None, high: int | None) -> int:
    """Integers from ``low`` to ``high``, both inside; None for no bound."""
    options = []
    if high is None or high >= 0:
        options.append(_from_to(machine, max(low or 0, 0), high))
    if low is None or low < 0:
        least = 1 if high is None or high >= 0 else -high
        options.append(machine.sequence(machine.literal(b"-"), _from_to(machine, least, None if low is None else -low)))
    return machine.choice(*options)


def bounded_number(
    machine: Machine, low: Decimal | None, high: Decimal | None, *, open_low: bool = False, open_high: bool = False
) -> int:
    """Numbers from ``low`` to ``high`` without exponents; ``open_low`` and ``open_high`` leave the bound itself out."""
    zero = Decimal(0)
    options = []
    reaches_zero = high is None or high > 0 or (high == 0 and not open_high)
    if reaches_zero and (low is None or low < 0 or (low == 0 and not open_low)):
        options.append(machine.sequence(machine.literal(b"-"), _magnitudes(machine, zero, zero, False, False)))  # -0.0
    if reaches_zero:
        starts_inside = low is None or low < 0
        least, is_open = (zero, False) if starts_inside or low is None else (low, open_low)
        options.append(_magnitudes(machine, least, high, is_open, open_high))
    if low is None or low < 0:
        # Below zero the bounds change places.
        least, is_open = (zero, True) if high is None or high >= 0 else (-high, open_high)
        most = None if low is None else -low
        options.append(machine.sequence(machine.literal(b"-"), _magnitudes(machine, least, most, is_open, open_low)))
    return machine.choice(*options)


def _digit(machine: Machine, low: int = 0, high: int = 9) -> int:
    return machine.one_of(range(48 + low, 48 + high + 1))


def _whole(machine: Machine) -> int:
    more = machine.sequence(_digit(machine, 1), machine.repeat(_digit(machine)))
    return machine.choice(machine.literal(b"0"), more)


def _from_to(machine: Machine, low: int, high: int | None) -> int:
    """Integers from ``low`` (at least 0) to ``high`` without a sign."""
    options = []
    size = len(str(low))
    if high is None:
        options.append(_same_size(machine, str(low), "9" * size))
        options.append(machine.sequence(_digit(machine, 1), machine.repeat(_digit(machine), size)))
        return machine.choice(*options)
    for length in range(size, len(str(high)) + 1):
        first = max(low, 10 ** (length - 1) if length > 1 else 0)
        last = min(high, 10**length - 1)
        if first <= last:
            options.append(_same_size(machine, str(first), str(last)))
    return machine.choice(*options)


def _same_size(machine: Machine, low: str, high: str) -> int:
    """Digits between ``low`` and ``high``, which are as long as each other."""
    if not low.strip("0") and not high.strip("9"):
        return machine.repeat(_digit(machine), len(low), len(low))
    first, last, more = int(low[0]), int(high[0]), len(low) - 1
    if first == last:
        return machine.sequence(_digit(machine, first, first), _same_size(machine, low[1:], high[1:]))
    options = [
        machine.sequence(_digit(machine, first, first), _same_size(machine, low[1:], "9" * more)),
        machine.sequence(_digit(machine, last, last), _same_size(machine, "0" * more, high[1:])),
    ]
    if first + 1 < last:
        options.append(
            machine.sequence(_digit(machine, first + 1, last - 1), machine.repeat(_digit(machine), more, more))
        )
    return machine.choice(*options)


def _magnitudes(machine: Machine, low: Decimal, high: Decimal | None, open_low: bool, open_high: bool) -> int:
    """Numbers from ``low`` (at least 0) to ``high`` without a sign."""
    first, low_part = _parts(low)
    last, high_part = (None, "") if high is None else _parts(high)
    whole_digits = max(len(str(first)), len(str(last or 0)))
    room = max(_SIGNIFICANT - whole_digits, len(low_part), len(high_part), 1)
    if last == first:
        return machine.sequence(
            _from_to(machine, first, first), _fraction(machine, low_part, open_low, high_part, open_high, room)
        )
    options = [
        machine.sequence(_from_to(machine, first, first), _fraction(machine, low_part, open_low, None, False, room))
    ]
    if last is None or last > first + 1:
        free = _fraction(machine, "", False, None, False, room)
        options.append(machine.sequence(_from_to(machine, first + 1, None if last is None else last - 1), free))
    if last is not None:
        options.append(
            machine.sequence(_from_to(machine, last, last), _fraction(machine, "", False, high_part, open_high, room))
        )
    return machine.choice(*options)


def _parts(value: Decimal) -> tuple[int, str]:
    """The whole part and the digits after the point, without zeros at their end."""
    whole, _, fraction = f"{value:f}".partition(".")
    return int(whole), fraction.rstrip("0")


def _fraction(machine: Machine, low: str, open_low: bool, high: str | None, open_high: bool, room: int) -> int:
    """Nothing, or a point and up to ``room`` digits, between two fractions given by their digits; None is 1, which is not reached."""
    digits = _digits(machine, low, open_low, high, open_high, room)
    options = [machine.sequence(machine.literal(b"."), part) for part in digits]
    if not low and not open_low and not (high == "" and open_high):
        options.append(machine.sequence())
    return machine.choice(*options)


def _digits(
    machine: Machine, low: str | None, open_low: bool, high: str | None, open_high: bool, room: int
) -> list[int]:
    """At least one digit of a fraction from ``low`` to ``high``; None: no bound is left to keep."""
    if room == 0:
        return []
    if low is None and high is None:
        return [machine.repeat(_digit(machine), 1, room)]
    least = int(low[0]) if low else 0
    most = 9 if high is None else int(high[0]) if high else 0
    options = []
    for digit in range(least, most + 1):
        rest_low = low[1:] if low and digit == least else ("" if low == "" and digit == 0 else None)
        rest_high = high[1:] if high and digit == most else ("" if high == "" else None)
        if rest_low == "" and not open_low:
            rest_low = None  # met with every digit that follows
        more = _digits(machine, rest_low, open_low, rest_high, open_high, room - 1)
        ends = rest_low is None and not (rest_high == "" and open_high)
        tail = ([machine.sequence()] if ends else []) + more
        if tail:
            options.append(machine.sequence(_digit(machine, digit, digit), machine.choice(*tail)))
    return options
