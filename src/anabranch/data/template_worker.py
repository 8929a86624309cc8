"""A process of its own that renders chat templates, within limits of time and memory; `anabranch.data.templates` starts it.

A template comes with a model, and is a program: it may loop for ever or ask for all memory, in more ways than a list could name.
So it runs where that ends this process alone. Run as a file, by its path, so that it waits for jinja2 only. A request has a
``template``, and ``values`` or none to be told its variables.
"""

import datetime
import json
from functools import lru_cache
from typing import Any, NoReturn

from anabranch.sandbox_worker import Limits, serve

# One template and its messages; those of real models take a hundredth of a second, compiling included.
LIMITS = Limits(seconds=1.0, memory=1 << 30)
# Characters of text, however little is asked, and for each character of the request: what is longer would hold up the tokenizer.
MOST_TEXT, MOST_GROWTH = 1_000_000, 8
_MOST_ERROR = 1000


def main() -> None:
    """Answer requests until there are no more."""
    # Imports jinja2, before its time is counted.
    _compiled("")
    serve(_answer, LIMITS)


def _answer(line: bytes) -> dict[str, Any]:
    import jinja2

    try:
        request = json.loads(line)
        compiled, variables = _compiled(request["template"])
        if request["values"] is None:
            return {"answer": sorted(variables)}
        text = compiled.render(request["values"])
        most = MOST_TEXT + MOST_GROWTH * len(line)
        return {"answer": text} if len(text) <= most else {"error": f"it makes more than {most:,} characters of them"}
    except MemoryError:
        raise
    except jinja2.TemplateError as error:
        return {"error": str(error)[:_MOST_ERROR]}
    except Exception as error:
        # It may divide by zero, call itself, be nested too deeply.
        return {"error": f"{type(error).__name__}: {error}"[:_MOST_ERROR]}


@lru_cache(maxsize=16)
def _compiled(source: str) -> tuple[Any, frozenset[str]]:
    """A template and the names it expects; compiled once, since a server renders it for every request."""
    import jinja2.ext
    import jinja2.meta
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %}...{% endgeneration %}`` marks the assistant's text for training; here it is just its body."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    # The environment that templates in the wild are written for: sandboxed, blocks trimmed, these helpers at hand.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source), frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main()
