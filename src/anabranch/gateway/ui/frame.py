"""What all pages share: the head of the document, the line at the top, the logo."""

from html import escape

CSP = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LOGO = (
    '<svg viewBox="0 0 40 24" aria-hidden="true"><path d="M1 12h9c6 0 5-9 12-9h7c5 0 4 9 10 9'
    'M10 12c6 0 5 9 12 9h7c5 0 4-9 10-9M10 12h29"/></svg>'
)


def framed(
    name: str, status: str, main: str, *, script: str = "", reload_s: int | None = None, kind: str = "", after: str = ""
) -> str:
    """A whole page.

    Args:
        name: what it is of, beside the logo.
        status: HTML on the right of it.
        main: HTML of the page itself.
        script: file under ``/ui/`` that it loads; "" for none.
        reload_s: seconds after which a browser loads it anew; None for never.
        kind: class of ``main``; "" for the parts that the script replaces.
        after: HTML behind it.
    """
    load = f'<script src="/ui/{escape(script)}" defer></script>\n' if script else ""
    anew = f'<meta http-equiv="refresh" content="{reload_s}">\n' if reload_s is not None else ""
    mark = f'class="{escape(kind)}"' if kind else 'id="parts"'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{anew}<title>{escape(name)} · anabranch</title>
<link rel="stylesheet" href="/ui/page.css">
<link rel="icon" href="/ui/icon.svg" type="image/svg+xml">
{load}</head>
<body>
<header>
<h1>{LOGO}anabranch <span>{escape(name)}</span></h1>
<p id="status">{status}</p>
</header>
<main {mark}>
{main}
</main>
{after}</body>
</html>
"""
