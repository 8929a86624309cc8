"""The page ``/ui/label``: two answers to one question, and which is better. A pure function; a small script sends the verdict."""

from html import escape

from anabranch.gateway.collect.labels import Pair
from anabranch.gateway.ui.frame import framed

# What may be said, the key on a keyboard, and in words.
BUTTONS = (
    ("first", "1", "The first"),
    ("second", "2", "The second"),
    ("tie", "3", "Alike"),
    ("skip", "0", "I cannot say"),
)


def render_label(pair: Pair | None, waiting: int, judged: int) -> str:
    """The whole page.

    Args:
        pair: to be judged; None if none waits.
        waiting: pairs that wait, this one among them.
        judged: pairs that do not any more.
    """
    status = f'{judged:,} of {judged + waiting:,} pairs judged \u00b7 <a href="/ui">the gateway</a>'
    if pair is None:
        said = "<code>anabranch gateway collect --judge human</code> brings pairs of answers here."
        if judged:
            said = "All of them are judged: run <code>anabranch gateway collect</code> again, which takes them in."
        return framed("label", status, f'<section class="whole"><p class="none">{said}</p></section>', kind="label")
    buttons = "".join(
        f'<button type="button" data-verdict="{said}" data-key="{key}">{words}<kbd>{key}</kbd></button>'
        for said, key, words in BUTTONS
    )
    main = (
        f'<section class="whole"><h2>Asked</h2>{_asked(pair)}</section>'
        f'<section><h2>The first answer</h2><pre class="text">{escape(pair.first)}</pre></section>'
        f'<section><h2>The second answer</h2><pre class="text">{escape(pair.second)}</pre></section>'
        f'<section class="whole" id="pair" data-id="{escape(pair.id)}"><h2>Which answers it better? '
        f'<small>right, complete, to the point</small></h2><div class="verdicts">{buttons}</div>'
        '<p class="none" id="told" hidden></p></section>'
    )
    return framed("label", status, main, script="label.js", kind="label", after=NO_SCRIPT)


NO_SCRIPT = '<noscript><p class="none">The verdict is sent by a script of this page, which is off.</p></noscript>\n'


def _asked(pair: Pair) -> str:
    if isinstance(pair.asked, str):
        return f'<pre class="text">{escape(pair.asked)}</pre>'
    return "".join(
        f'<p class="turn">{escape(str(one.get("role")))}</p><pre class="text">{escape(_content(one.get("content")))}</pre>'
        for one in pair.asked
    )


def _content(content: object) -> str:
    """Text of a message; of parts, those that are text."""
    if not isinstance(content, list):
        return str(content)
    return "\n".join(str(part.get("text", f"[{part.get('type')}]")) for part in content if isinstance(part, dict))
