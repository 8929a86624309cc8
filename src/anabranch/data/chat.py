"""Conversations as prompts: a folder's own Jinja template, ChatML, or plain lines."""

import datetime
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NoReturn

from anabranch.errors import TokenizerError

_MOST_REPEATED, _MOST_POWER = 1_000_000, 1000


def render_chat(
    messages: Sequence[dict[str, str]],
    *,
    template: str | None,
    has_chatml: bool,
    special: dict[str, str],
    add_generation_prompt: bool,
) -> str:
    """The prompt text of ``messages``; see `Tokenizer.apply_chat_template`.

    ``special`` gives the text of the ``bos``, ``eos`` and ``pad`` tokens to the template.
    """
    for position, message in enumerate(messages):
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise TokenizerError(f"message {position} has no {field}; write {{'role': 'user', 'content': '...'}}")
    if template is not None:
        values = {f"{name}_token": token for name, token in special.items()}
        return render_template(template, messages=list(messages), add_generation_prompt=add_generation_prompt, **values)
    return (
        _render_chatml(messages, add_generation_prompt)
        if has_chatml
        else _render_plain(messages, add_generation_prompt)
    )


def _render_chatml(messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def _render_plain(messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
    turns = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
    return "".join(turns) + ("Assistant:" if add_generation_prompt else "")


def render_template(template: str, **values: Any) -> str:
    """The text of a Jinja chat template. Raises TokenizerError if it cannot be read or refuses the values."""
    import jinja2

    try:
        return _compiled(template)[0].render(**values)
    except jinja2.TemplateError as error:
        raise TokenizerError(f"the tokenizer's chat template refused the messages: {error}") from None
    except Exception as error:  # a template is a program: it may divide by zero, call itself, ask for all memory
        raise TokenizerError(
            f"the tokenizer's chat template refused the messages: {type(error).__name__}: {error}"
        ) from None


def template_variables(template: str) -> frozenset[str]:
    """The names that a template expects to be given (``messages``, ``tools``, ...). Raises TokenizerError as `render_template`."""
    try:
        return _compiled(template)[1]
    except Exception as error:  # jinja's own, and Python's where it is nested too deeply
        raise TokenizerError(f"the tokenizer's chat template cannot be read: {error}") from None


@lru_cache(maxsize=16)
def _compiled(source: str) -> tuple[Any, frozenset[str]]:
    """A template and the names it expects; compiled once, since a server renders it for every request."""
    import jinja2.ext
    import jinja2.meta
    import jinja2.sandbox  # arrives with torch; only templates need it

    class Generation(jinja2.ext.Extension):
        """``{% generation %}...{% endgeneration %}`` marks the assistant's text for training; here it is just its body."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """The sandbox, whose products and powers stay small: ``'x' * 10**12`` would take all memory."""

        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(side) if isinstance(side, str | list | tuple) else side for side in (left, right)]
            is_long = operator == "*" and not all(isinstance(side, int | float) for side in (left, right))
            if is_long and abs(sizes[0] * sizes[1]) > _MOST_REPEATED:
                raise OverflowError(f"a repetition makes more than {_MOST_REPEATED} parts")
            if operator == "**" and any(abs(side) > _MOST_POWER for side in sizes):
                raise OverflowError(f"a power of numbers above {_MOST_POWER}")
            return super().call_binop(context, operator, left, right)

    # The environment that templates in the wild are written for: sandboxed, blocks trimmed, these helpers at hand.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])

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
