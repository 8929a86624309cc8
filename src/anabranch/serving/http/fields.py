"""What a request may say: each parameter with what it may be, and those we know and do not serve. Wrong ones are named (400)."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from anabranch.bounds import MOST_LAYERS, MOST_QUERY
from anabranch.serving.chat import FieldError
from anabranch.serving.core.rewires import SETTINGS
from anabranch.serving.grammar.forms import depth_of
from anabranch.web.api_error import ApiError, wrong, wrong_field
from anabranch.web.body import is_int, said

Check = tuple[Callable[[Any], bool], str]
MOST_STOPS, MOST_STOP_LENGTH, MOST_LOGPROBS = 4, 1000, 20
# Of a depth; a block may come twice.
MOST_BLOCKS = 2 * MOST_LAYERS
INT64 = 2**63
_NAME = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)
# Of the path of a field.
_PART, _INDEX = re.compile(r"\[\d+\]|[.]?[^.\[]+"), re.compile(r"\[\d+\]")


def integer(low: int, high: int) -> Check:
    """An integer in a range."""
    return lambda value: is_int(value) and low <= value <= high, f"an integer from {low:,} to {high:,}"


def number(low: float, high: float, *, is_below: bool = False) -> Check:
    """A number in a range, whose end is not of it where ``is_below``."""

    def is_right(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and low <= value <= high and not (is_below and value == high)

    return is_right, f"a number from {low:g} to {'below ' if is_below else ''}{high:g}"


def text(most: int) -> Check:
    """A string of a bounded length."""
    return lambda value: isinstance(value, str) and len(value) <= most, f"text of at most {most:,} characters"


def _is_stop(value: Any) -> bool:
    values = [value] if isinstance(value, str) else value
    return (
        isinstance(values, list)
        and len(values) <= MOST_STOPS
        and all(isinstance(part, str) and 0 < len(part) <= MOST_STOP_LENGTH for part in values)
    )


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= 16 and all(isinstance(part, str) for part in value.values())


def _is_bias(value: Any) -> bool:
    is_right = number(-100, 100)[0]
    return (
        isinstance(value, dict)
        and len(value) <= 1024
        and all(key.isascii() and key.isdigit() and len(key) < 10 and is_right(part) for key, part in value.items())
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 64 and all(is_int(part) and 0 <= part < 2**31 for part in value)


def _is_depth(value: Any) -> bool:
    if isinstance(value, str):
        return value in ("full", "routed", "pruned")
    return (
        isinstance(value, list)
        and 1 <= len(value) <= MOST_BLOCKS
        and all(is_int(part) and abs(part) < 2**31 for part in value)
    )


def _is_kwargs(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) > 16 or not all(map(_NAME.fullmatch, value)):
        return False
    return depth_of(value) <= 8 and len(json.dumps(value)) <= 10_000


BOOL: Check = (lambda value: isinstance(value, bool), "true or false")
OBJECT: Check = (lambda value: isinstance(value, dict), "an object")


def of_schema(schema: Mapping[str, Any]) -> Check:
    """What a JSON schema of `anabranch.field_schemas` allows."""
    if "enum" in schema:
        *words, last = schema["enum"]
        return lambda value: value in (*words, last), f"{', '.join(words)} or {last}"
    if schema["type"] == "boolean":
        return BOOL
    if schema["type"] == "integer":
        return integer(schema["minimum"], schema["maximum"])
    end = schema.get("exclusiveMaximum")
    return number(schema["minimum"], schema["maximum"] if end is None else end, is_below=end is not None)


DEPTH: Check = (_is_depth, f'"full", "routed", "pruned" or a list of 1 to {MOST_BLOCKS} blocks')
ADAPTERS: Check = (OBJECT[0], "an object of adapters and their weights")
TASK: Check = text(256)
KWARGS: Check = (
    _is_kwargs,
    "an object of at most 16 names, nested at most 8 deep, with at most 10,000 characters as JSON",
)
REWIRE: Check = (lambda value: isinstance(value, bool | dict), "true or false, or an object of settings")
# Of an object there: what is of the server's limits, and of the model, its engine looks at.
REWIRE_FIELDS: dict[str, Check] = {
    **{name: of_schema(schema) for name, schema in SETTINGS.items()},
    "state": (OBJECT[0], "an object, as an answer had it"),
    "return_state": BOOL,
}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
SHARED: dict[str, Check] = {
    "model": text(256),
    "max_tokens": integer(0, 2**31 - 1),
    "min_tokens": integer(0, 2**31 - 1),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": integer(-1, 2**31 - 1),
    "min_p": number(0, 1),
    "n": integer(1, 128),
    "stop": (_is_stop, f"text, or a list of at most {MOST_STOPS} texts, none empty"),
    "stop_token_ids": (_is_ids, "a list of at most 64 token ids"),
    "seed": integer(-INT64, INT64 - 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 100),
    "logit_bias": (_is_bias, "an object of at most 1,024 token ids with numbers from -100 to 100"),
    "stream": BOOL,
    "stream_options": OBJECT,
    "response_format": OBJECT,
    "ignore_eos": BOOL,
    "priority": integer(-1000, 1000),
    "cache_salt": text(256),
    "user": text(512),
    "metadata": (_is_metadata, "an object of at most 16 texts"),
    "routing": BOOL,
    "num_streams": integer(1, 2**31 - 1),
    "depth": DEPTH,
    "depth_control": number(-1, 1),
    "rewire": REWIRE,
    "adapters": ADAPTERS,
    "task": TASK,
    "query": text(MOST_QUERY),
}
CHAT: dict[str, Check] = {
    **SHARED,
    "messages": (lambda value: isinstance(value, list) and bool(value), "a list of at least one message"),
    "max_completion_tokens": integer(1, 2**31 - 1),
    "logprobs": BOOL,
    "top_logprobs": integer(0, MOST_LOGPROBS),
    "tools": (lambda value: isinstance(value, list) and len(value) <= 128, "a list of at most 128 tools"),
    "tool_choice": (lambda value: isinstance(value, str | dict), '"none", "auto", "required" or an object'),
    "parallel_tool_calls": BOOL,
    "chat_template_kwargs": KWARGS,
    "reasoning_effort": (lambda value: isinstance(value, str) and value in EFFORTS, f"one of {', '.join(EFFORTS)}"),
}
COMPLETION: dict[str, Check] = {
    **SHARED,
    "prompt": (lambda value: isinstance(value, str | list), "text, a list of texts, or lists of token ids"),
    "logprobs": integer(0, MOST_LOGPROBS),
    "echo": BOOL,
    "best_of": integer(1, 128),
}

# What OpenAI's API knows, or our own in Python, and this server does not do: the values that ask for nothing pass, the others are refused
# by name.
_HINTS = {name: (lambda value: True) for name in ("safety_identifier", "prompt_cache_key", "prompt_cache_retention")}
_SHARED_REFUSED: dict[str, Callable[[Any], bool]] = {
    "service_tier": lambda value: value in ("auto", "default"),
    "store": lambda value: value is False,
    # Of `Request`; here it is `depth`, where whoever runs the server lets one say it.
    "path": lambda value: False,
    "routes_depth": lambda value: False,
    "skips_tokens": lambda value: False,
    # There `rewire`.
    "rewires": lambda value: False,
    **_HINTS,
}
REFUSED: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "chat": {
        **_SHARED_REFUSED,
        "audio": lambda value: False,
        "modalities": lambda value: value == ["text"],
        "prediction": lambda value: False,
        "web_search_options": lambda value: False,
        "functions": lambda value: value == [],
        "function_call": lambda value: value == "none",
        "verbosity": lambda value: value == "medium",
    },
    "completions": {**_SHARED_REFUSED, "suffix": lambda value: value == ""},
}
KNOWN: Mapping[str, Mapping[str, Check]] = {"chat": CHAT, "completions": COMPLETION}


def check(body: Mapping[str, Any], kind: str) -> list[str]:
    """Check the type and range of every parameter of a request.

    Args:
        body: parsed.
        kind: ``chat`` or ``completions``.

    Returns the names that nobody knows. Raises ApiError (400) that names the parameter.
    """
    known, refused, unknown = KNOWN[kind], REFUSED[kind], []
    for name, value in body.items():
        # As if it were not there.
        if value is None:
            if name not in known and name not in refused:
                unknown.append(name)
        elif name in known:
            expect(name, value, known[name])
        elif name in refused:
            if not refused[name](value):
                raise unsupported_field(name, f"is {said(value)}, which this server does not do; leave it out")
        else:
            unknown.append(name)
    return unknown


def expect(name: str, value: Any, wanted: Check) -> None:
    """Raises ApiError (400) unless the value is right."""
    if not wanted[0](value):
        raise wrong_field(name, f"is {said(value)}; it must be {wanted[1]}")


def only(value: Mapping[str, Any], name: str, allowed: Mapping[str, Check]) -> None:
    """Check the fields of an object in a request; others than those allowed are refused."""
    for field, part in value.items():
        if field not in allowed:
            raise wrong(f"{name}.{field[:60]}", f"{name} has no field {field[:60]!r}; it takes {', '.join(allowed)}")
        if part is not None:
            expect(f"{name}.{field}", part, allowed[field])


def unsupported(param: str, message: str) -> ApiError:
    """400: known, but not served."""
    return wrong(param, message, "unsupported_parameter")


def unsupported_field(param: str, what: str) -> ApiError:
    """As `unsupported`, see `wrong_field`."""
    return wrong_field(param, what, "unsupported_parameter")


def of_field(error: FieldError) -> ApiError:
    """400: what was found wrong in messages or tools."""
    return (unsupported_field if error.is_unsupported else wrong_field)(error.param, error.what)


@dataclass(frozen=True, slots=True)
class FieldName:
    """What a field is called by another API than the one that checks it.

    Attributes:
        param: its path there; ``[]`` takes the next index of the path that it stands for.
        words: for it in a sentence; None for the path.
    """

    param: str
    words: str | None = None


def by_name(error: ApiError, names: Mapping[str, FieldName]) -> ApiError:
    """The same error by other names: its field is renamed, and all else that it says stays.

    Args:
        error: of this API.
        names: of paths without indexes (``tools[].function``); the longest beginning of the field's path counts, and what follows it stays.
    """
    parts = _PART.findall(error.param or "")
    for count in range(len(parts), 0, -1):
        name = names.get(_INDEX.sub("[]", "".join(parts[:count])))
        if name is not None:
            param = name.param
            for index in filter(_INDEX.fullmatch, parts[:count]):
                param = param.replace("[]", index, 1)
            param += "".join(parts[count:])
            message = str(error) if error.what is None else f"{name.words or param} {error.what}"
            made = ApiError(error.status, error.code, message, type=error.type, param=param, headers=error.headers)
            made.what = error.what
            return made
    return error
