"""`render_template`: the text of a model's chat template, which cannot hang or exhaust the process that asks for it."""

from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from anabranch.data import template_worker
from anabranch.errors import TokenizerError
from anabranch.extras import require
from anabranch.sandbox import Refused, Sandbox, SandboxBusyError, SandboxError, Work

WORK = Work(
    program=Path(template_worker.__file__),
    does="renders chat templates",
    do="render chat templates",
    limits=template_worker.LIMITS,
    greeting={"template": "", "values": {}},
    require=partial(require, "jinja2", by="a chat template"),
)


def render_template(template: str, /, **values: Any) -> str:
    """The text of a Jinja chat template.

    It is rendered in another process, with a second of computing, a gigabyte of memory, and a million characters beyond eight for each of
    the request's (`template_worker`), so that a template that loops for ever ends there. There are two to four of them, for which templates
    take turns; one is kept for templates that have been quick.

    Raises TokenizerError if it cannot be read, refuses the values, passes a limit, or if no process can be started or is free within 20 s;
    MissingExtraError without jinja2.
    """
    try:
        return _ask(template, values)
    except Refused as error:
        raise TokenizerError(f"the tokenizer's chat template refused the messages: {error}") from None


@lru_cache(maxsize=16)
def template_variables(template: str) -> frozenset[str]:
    """The names that a template expects to be given (``messages``, ``tools``, ...). Raises TokenizerError as `render_template`."""
    try:
        return frozenset(_ask(template, None))
    except Refused as error:
        raise TokenizerError(f"the tokenizer's chat template cannot be read: {error}") from None


class TemplatesBusyError(TokenizerError):
    """No process was free to render a template in time: nobody's fault who asks, and worth asking again."""


def _ask(template: str, values: Mapping[str, Any] | None) -> Any:
    try:
        return Sandbox.of(WORK).ask(template, {"template": template, "values": values})
    except SandboxBusyError as error:
        raise TemplatesBusyError(str(error)) from None
    except SandboxError as error:
        raise TokenizerError(str(error)) from None
