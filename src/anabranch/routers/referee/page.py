"""The evaluation as one HTML file that asks for nothing from outside and follows the reader's light or dark preference."""

import base64
from collections.abc import Sequence
from html import escape
from string import Template

from anabranch import __version__
from anabranch.report.style import to_svg
from anabranch.routers.referee.pictures import draw
from anabranch.routers.referee.report import Report

_READ = (
    "A line is what a router reaches by mixing its settings; its marker is the setting it was asked for, with the 95% interval over "
    "questions. Above the dashed grey line routing beats drawing among single models; the dotted line knows the future."
)
_WORDS = (
    "Score: mean quality of the answers given. Gain: against the best single model; a star marks a gain or loss that holds at 5% after "
    "Holm's correction for all strategies tried. AIQ: mean score over the range of costs, each budget spent as well as mixing "
    "allows. APGR, with two models: the share of their gap recovered, over all shares of strong calls; 0.5 is chance."
)


def page(report: Report, title: str) -> str:
    """The whole page."""
    svg = base64.b64encode(to_svg(draw(report, " ")).encode()).decode()
    facts = {**report.data, "seeds": ", ".join(map(str, report.seeds)), "wall time": f"{report.seconds:.1f} s"}
    failed = "".join(f"<p>{escape(name)} was left out: {escape(reason)}</p>" for name, reason in report.failed.items())
    return _PAGE.substitute(
        title=escape(title),
        text=f"<p>{escape(report.describe())}</p>{failed}{_verdict(report)}",
        picture=f'<figure><img alt="Cost against quality" src="data:image/svg+xml;base64,{svg}">'
        f"<figcaption>{escape(_READ)}</figcaption></figure>",
        tables="".join(
            _table(heading, *cells) for heading, cells in zip(("Strategies", "Baselines"), report.tables(), strict=True)
        ),
        words=escape(_WORDS),
        facts="".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items() if value
        ),
        version=escape(__version__),
    )


def _verdict(report: Report) -> str:
    verdict = report.verdict
    if verdict is None:
        return ""
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict.sentences())
    following = f"<p>Next: <code>{escape(verdict.next)}</code></p>" if verdict.next else ""
    return f"<h2>Verdict</h2><ul>{said}</ul>{following}"


def _table(heading: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f"<h2>{escape(heading)}</h2><div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
:root{color-scheme:light dark;--ink:#1f2429;--muted:#69727b;--line:#dfe3e7;--page:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--muted:#9aa4ae;--line:#343b42;--page:#16191c}}
body{margin:0 auto;padding:1.5rem 1rem 3rem;max-width:66rem;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 .5rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
figure{margin:1rem 0}img{width:100%;height:auto}figcaption,.words,footer,dt{color:var(--muted);font-size:.9rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .55rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{white-space:pre-line;vertical-align:bottom;font-weight:600}th[scope=row],thead th:first-child{text-align:left;font-weight:500}
dl{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem}dd{margin:0}
</style></head><body><h1>$title</h1>$text$picture$tables<p class=words>$words</p><dl>$facts</dl>
<footer>anabranch $version</footer></body></html>
""")
