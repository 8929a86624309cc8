"""The page ``/ui/ab``: A/B tests as they stand, each arm with its confidence sequence. A pure function of the results; it has no script."""

from collections.abc import Sequence
from html import escape

from anabranch.gateway.ab import ABResult, ArmResult
from anabranch.gateway.ui.frame import framed
from anabranch.gateway.ui.page import NONE, dollar_text, number_text

# Seconds after which a browser loads the page anew.
RELOAD_S = 60
ROW_PX = 34
WORDS = {"score": "mean score", "success": "answered", "cost": "dollars a request"}


def render_ab(results: Sequence[ABResult]) -> str:
    """The whole page."""
    body = "\n".join(map(_test, results)) or (
        '<section><h2>No A/B test</h2><p class="none">Name two strategies in the config: '
        "<code>[ab.try]</code> with <code>a</code> and <code>b</code>, and ask <code>auto/try</code>.</p></section>"
    )
    return framed("A/B tests", '<a href="/ui">the gateway</a>', body, reload_s=RELOAD_S, kind="tests")


def _test(one: ABResult) -> str:
    name = escape(one.name)
    state = "closed" if one.found != "not resolved" else "half_open"
    label = f"{one.found} is better" if one.found != "not resolved" else one.found
    left = (
        f'<p class="quiet">{one.uncounted:,} requests had neither key nor user: they went to a and do not count.</p>'
        if one.uncounted
        else ""
    )
    return (
        f'<section aria-labelledby="ab-{name}"><h2 id="ab-{name}">auto/{name} <span class="state {state}">{escape(label)}</span></h2>'
        f"<p>{escape(one.sentence())}</p>{_chart(one)}{_table(one)}{left}"
        f'<p class="quiet">{one.share:.0%} of the {one.unit}s get b. A {one.unit} counts once, with {_counted(one)}'
        f"; bars hold the mean with {1 - one.alpha:.0%} at all times together.{_waiting(one)}</p></section>"
    )


def _counted(one: ABResult) -> str:
    return "its first answer" if one.answers == 1 else f"the mean of its first {one.answers} answers"


def _waiting(one: ABResult) -> str:
    """What the column is of, where there is anything in it."""
    count = one.a.waiting + one.b.waiting
    what = f"fewer than {one.answers} answers that count for the {WORDS[one.metric]}"
    return f" {count:,} {one.unit}s are awaited: they have {what} so far, and are left out until then." if count else ""


def _chart(one: ABResult) -> str:
    """A bar for each arm from 0 to the most, with a dot at the mean."""
    height = 2 * ROW_PX + 24
    parts = []
    for place, (side, arm) in enumerate((("a", one.a), ("b", one.b))):
        y = ROW_PX * place + ROW_PX / 2
        low, high = (_x(end, one.most) for end in (arm.low, arm.high))
        title = f"{arm.strategy}: {number_text(arm.mean)}, {number_text(arm.low)} to {number_text(arm.high)}"
        parts.append(f'<text x="0" y="{y + 4:.0f}" class="name">{side}</text>')
        parts.append(f'<line x1="8%" x2="97%" y1="{y:.0f}" y2="{y:.0f}" class="axis"/>')
        parts.append(
            f'<rect class="span" x="{low:.2f}%" width="{max(high - low, 0.2):.2f}%" y="{y - 6:.0f}" height="12">'
            f"<title>{escape(title)}</title></rect>"
        )
        if arm.mean is not None:
            parts.append(f'<circle class="strategy" cx="{_x(arm.mean, one.most):.2f}%" cy="{y:.0f}" r="5"/>')
    parts += [
        f'<text x="{_x(value, one.most):.1f}%" y="{height - 4}" class="tick">{number_text(value)}</text>'
        for value in (0.0, 0.5 * one.most, one.most)
    ]
    about = f"{WORDS[one.metric]} of both arms with confidence sequences"
    return f'<svg class="chart" height="{height}" role="img" aria-label="{about}">{"".join(parts)}</svg>'


def _x(value: float, most: float) -> float:
    return 8 + 89 * min(max(value / most, 0.0), 1.0)


def _table(one: ABResult) -> str:
    rows = "".join(_row(side, arm, one) for side, arm in (("a", one.a), ("b", one.b)))
    heads = "".join(
        f'<th scope="col" class="number{minor}">{head}</th>'
        for head, minor in (
            ("requests", " minor"),
            (f"{one.unit}s", ""),
            ("awaited", " minor"),
            (WORDS[one.metric], ""),
            (f"{1 - one.alpha:.0%}", " minor"),
            ("cost", ""),
        )
    )
    head = f'<thead><tr><th scope="col">arm</th>{heads}</tr></thead>'
    return f'<div class="scroll"><table class="lines">{head}<tbody>{rows}</tbody></table></div>'


def _row(side: str, arm: ArmResult, one: ABResult) -> str:
    chosen = " class=chosen" if side == one.found else ""
    cost = NONE if arm.cost_usd is None else dollar_text(arm.cost_usd, 4)
    return (
        f'<tr{chosen}><th scope="row">{side}: {escape(arm.strategy)}</th><td class="number minor">{arm.requests:,}</td>'
        f'<td class="number">{arm.units:,}</td><td class="number minor">{arm.waiting:,}</td>'
        f'<td class="number">{number_text(arm.mean)}</td>'
        f'<td class="number minor">{number_text(arm.low)}{NONE}{number_text(arm.high)}</td><td class="number">{cost}</td></tr>'
    )
