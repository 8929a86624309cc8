"""`Asked`: what a request asks for that changes what it costs, beside its tokens: a tier, caching, sound, pictures, searches of the web.

A sender chooses these. Each is priced where the model's price names it, and is refused where it does not: nobody could say what it costs.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.gateway.prompt_tokens import PromptCount, text_of
from anabranch.gateway.providers.usage import Usage, tier_of
from anabranch.routers.money import Price
from anabranch.web.large_json import num_bytes

Json = Mapping[str, Any]

# Tools that cost no more than tokens: they run at the sender's, or look for others in the prompt. Beginnings of their types, which carry
# dates.
FREE_TOOLS = (
    "function",
    "custom",
    "bash",
    "text_editor",
    "str_replace_based_edit",
    "computer",
    "memory",
    "tool_search",
    "local_shell",
    "shell",
    "apply_patch",
    "namespace",
)

# Tokens that one use of a tool brings into the prompt at most, by the beginning of its type: ten results of a search, of a usual page each;
# and a long paper, unless the tool says how much (`max_content_tokens`). Anthropic, "Web search tool", "Web fetch tool".
PAGES = {"web_search": 30_000, "web_fetch": 125_000}

# What somebody's server tells (MCP) is read as a prompt too, and may be as long as a model has room for; none has more. So may be what it
# lists, its tools, which is read before the first use of one. Claude asks such servers in so many rounds at most, each of which reads all
# again (Anthropic, "Handling stop reasons", pause_turn); elsewhere the sender has to say how often (`max_tool_calls`).
LARGEST_CONTEXT, ROUNDS = 2_000_000, 10
_OF_SERVERS, _OF_CLAUDE = "mcp", "mcp_toolset"

# Tools of Claude, which are held to their own `max_uses` and nothing else; others know no such field. A chat's `max_tool_calls` becomes
# that where a provider sees to it (`Provider.holds_tool_calls`).
_CLAUDES = re.compile(r"[a-z_]+_20\d{6}")

# These look for other tools among those of the request, at the provider (Anthropic, "Tool search tool"; OpenAI, "Tool search"). What each
# brings is read behind the prompt, and all again with it: Claude's are of the rounds of above, and of OpenAI's nothing is known that would
# bound them but `max_tool_calls`, so that as many are reserved.
_CLAUDES_FINDER, _FINDER = "tool_search_tool", "tool_search"

# Fields that say how often tools may be used at most: of a request all of its tools, and of one tool.
_MOST_CALLS, _MOST_USES = "max_tool_calls", ".max_uses"

# Of a request that has its prompt summed up on the way.
COMPACTION = "context_management"

# Fields of providers that choose another model, another price, or searches, and of which no price list speaks.
OTHERS: Mapping[str, str] = {
    "models": "other models to answer",
    "route": "a way to choose models",
    "fallbacks": "other models to answer",
    "provider": "who serves the model",
    "plugins": "plugins",
    "search_parameters": "searches",
    "search_settings": "searches",
    "enable_search": "searches",
    "search_type": "a kind of search",
    "inference_geo": "where the model runs",
    "compound_custom": "other models to answer",
    COMPACTION: "a summary of the prompt, which is billed beside the answer",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for.

    Attributes:
        tier: of ``service_tier`` and ``speed``; "" for none.
        ttl: for how long its prompt asks to be cached: ``5m``, ``1h``, or "" for not at all.
        searches: of the web, at most.
        audio_input: its prompt holds sound.
        audio_output, image_output: its answer may be sound, or pictures.
        others: fields whose price no list has, and those that would say how often a tool may be used.
        held: fields of the latter that a provider sets as ``max_tool_calls`` says, if it is one that does.
        calls: as how many calls it may be billed, where those have a price.
        uses: of tools that run at the provider, or that it asks a server for, and that bring pages, at most, the searches of such tools
            among them.
        page: tokens that one of these brings at most.
        listed: tokens that servers say of their tools, at most, before the first of these.
        found: tokens of the request's own tools that one of these brings once more, at most.
    """

    tier: str = ""
    ttl: str = ""
    searches: int = 0
    audio_input: bool = False
    audio_output: bool = False
    image_output: bool = False
    others: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    calls: int = 1
    uses: int = 0
    page: int = 0
    listed: int = 0
    found: int = 0

    def lacks(self, price: Price, holds: bool = False) -> tuple[str, str | None] | None:
        """The first field that has no price, and what about it has none; None if all have one, or nothing costs anything.

        Of a field that would say how often a tool is used at most there is nothing to say but that: None in its place.

        Args:
            price: of the model.
            holds: its provider sees to the fields that are ``held``.
        """
        if price.is_free:
            return None
        if price.of_tier(self.tier) is None:
            return ("speed" if self.tier == "fast" else "service_tier"), f"the tier {self.tier!r} (tiers)"
        for is_asked, rate, field, what in (
            (self.searches, price.web_search, "web_search_options", "searches of the web (web_search_usd)"),
            (self.audio_input, price.audio_input, "messages", "sound in a prompt (audio_input_usd)"),
            (self.audio_output, price.audio_output, "modalities", "sound in an answer (audio_output_usd)"),
            (self.image_output, price.image_output, "modalities", "pictures in an answer (image_output_usd)"),
        ):
            if is_asked and rate is None:
                return field, what
        others = self.others if holds else (*self.others, *self.held)
        if not others:
            return None
        is_end = others[0] == _MOST_CALLS or others[0].endswith(_MOST_USES)
        return others[0], None if is_end else OTHERS.get(others[0], "a tool that the provider runs")

    def most(self, count: PromptCount, completion: int, context: int | None = None) -> Usage:
        """The most that one call may come to, and the rest as dear as it may be.

        Args:
            count: of the prompt.
            completion: tokens of the answer at most.
            context: tokens that the model has room for; None if unknown.
        """
        prompt = count.at_most + (pages := self._pages(count.at_most, completion, context))
        return Usage(
            prompt,
            completion,
            0,
            True,
            tier=self.tier,
            searches=self.searches or None,
            audio_input=min(count.audio, prompt),
            image_input=min(count.images, prompt),
            audio_output=completion if self.audio_output else 0,
            image_output=completion if self.image_output else 0,
            cache_write=prompt if self.ttl == "5m" else 0,
            cache_write_1h=prompt if self.ttl == "1h" else 0,
            calls=self.calls if self.calls > 1 else None,
            pages=pages,
        )

    def _pages(self, prompt: int, completion: int, context: int | None) -> int:
        """Prompt tokens beside the sender's: after each use the model reads all again, with what was found and said so far."""
        uses = self.uses
        if not uses and not self.listed:
            return 0
        page = max(self.page, min(self.found, prompt))
        read = uses * (prompt + completion) + page * uses * (uses + 1) // 2 + self.listed * (uses + 1)
        if context is None:
            return read
        # Of the first reading the sender's prompt is counted already.
        first = max(context - prompt, 0) if self.listed else 0
        return min(read, first + uses * max(context, prompt + completion))


def asked_of(body: Json, count: PromptCount | None = None, *, is_chat: bool = True) -> Asked:
    """Of a request in OpenAI's or Anthropic's form, which has been checked: of a chat, a response or a message.

    Args:
        body: as it came.
        count: of its prompt, where it is known: it finds sound wherever that is.
        is_chat: it is one of a chat; others go to their own kind of provider as they came.
    """
    messages = [one for name in ("messages", "input") for one in _listed(body.get(name)) if isinstance(one, dict)]
    parts = [part for one in [*messages, {"content": body.get("system")}] for part in _parts(one)]
    tools = [tool for tool in _listed(body.get("tools")) if isinstance(tool, dict)]
    calls = [call for one in messages for call in _listed(one.get("tool_calls")) if isinstance(call, dict)]
    inner = [part for one in parts for part in _parts(one)]
    functions = [one["function"] for one in [*tools, *calls] if isinstance(one.get("function"), dict)]
    ends = [_most_uses(body, tool, is_chat) for tool in tools]
    searches, others = _searches(body, tools, ends)
    uses, page, listed, found = _uses(body, tools, ends)
    words = {str(word).lower() for word in _listed(body.get("modalities"))}
    return Asked(
        tier=_tier(body),
        ttl=_ttl([body, *messages, *parts, *inner, *tools, *calls, *functions]),
        searches=searches,
        uses=uses,
        page=page,
        listed=listed,
        found=found,
        audio_input=any(part.get("type") == "input_audio" for part in parts) or (count is not None and count.audio > 0),
        audio_output="audio" in words or bool(body.get("audio")),
        image_output="image" in words,
        others=(
            *others,
            *(name for name in OTHERS if _is_on(body.get(name)) and (name != COMPACTION or _compacts(body))),
        ),
        held=tuple(f"tools[{at}]{_MOST_USES}" for at, end in enumerate(ends) if end is not None and end.is_held),
    )


def _tier(body: Json) -> str:
    word = body.get("service_tier")
    # What is no word is of no tier that has a price.
    odd = (
        ""
        if word is None or (isinstance(word, str) and tier_of({"service_tier": word}) == word.lower())
        else str(word)[:40]
    )
    fast, named = body.get("speed") == "fast", odd or tier_of({"service_tier": word})
    if fast:
        return f"{named} fast" if named and named not in ("auto", "default", "standard_only") else "fast"
    return named


def _ttl(tables: Iterable[Json]) -> str:
    marks = [table["cache_control"] for table in tables if isinstance(table.get("cache_control"), dict)]
    if not marks:
        return ""
    # Any other time is dearer than the short one, if it is there at all.
    return "5m" if all(mark.get("ttl", "5m") == "5m" for mark in marks) else "1h"


@dataclass(frozen=True, slots=True)
class _End:
    """How often a tool may be used: ``most`` times; ``is_held``, if its provider sees to that."""

    most: int
    is_held: bool = False


def _searches(body: Json, tools: Iterable[Json], ends: Sequence[_End | None]) -> tuple[int, list[str]]:
    """Searches at most; and tools that cost something else, or of which it is not said how often they are used."""
    searches, others = 1 if _is_on(body.get("web_search_options")) else 0, []
    for at, (tool, end) in enumerate(zip(tools, ends, strict=True)):
        kind = str(tool.get("type", "function"))
        if kind.startswith(tuple(PAGES)):
            if end is None:
                others.append(f"tools[{at}]{_MOST_USES}" if _is_claudes(tool) else _MOST_CALLS)
            elif kind.startswith("web_search"):
                searches += end.most
        elif kind.startswith(_OF_SERVERS):
            if end is None and kind != _OF_CLAUDE:
                others.append(_MOST_CALLS)
        elif not kind.startswith(FREE_TOOLS) or _runs_there(tool):
            others.append(f"tools[{at}]")
    return searches, others


def _runs_there(tool: Json) -> bool:
    """A shell in a container of the provider's."""
    where = tool.get("environment")
    return where is not None and not (isinstance(where, dict) and where.get("type") == "local")


def _uses(body: Json, tools: Sequence[Json], ends: Sequence[_End | None]) -> tuple[int, int, int, int]:
    """How often tools that bring pages are used, at most; the tokens of the longest page, of what servers say of their tools, and of the
    request's own that are looked for."""
    uses = page = listed = found = 0
    asks_servers, finds = bool(body.get("mcp_servers")), False
    for tool, end in zip(tools, ends, strict=True):
        named = str(tool.get("type", "function"))
        asks_servers |= named == _OF_CLAUDE
        finds |= named.startswith(_CLAUDES_FINDER)
        if named.startswith(_OF_SERVERS) and named != _OF_CLAUDE:
            uses, page, listed = uses + (0 if end is None else end.most), LARGEST_CONTEXT, LARGEST_CONTEXT
        if named == _FINDER and tool.get("execution") != "client":
            uses, found = uses + (ROUNDS if end is None else end.most), _size_of(tools)
        kind = next((kind for kind in PAGES if named.startswith(kind)), None)
        if kind is None:
            continue
        said = tool.get("max_content_tokens")
        uses += 0 if end is None else end.most
        page = max(page, said if kind == "web_fetch" and type(said) is int and said > 0 else PAGES[kind])
    if asks_servers:
        page = listed = LARGEST_CONTEXT
    if finds:
        found = _size_of(tools)
    return uses + (ROUNDS if asks_servers or finds else 0), page, listed, found


def _size_of(tools: Sequence[Json]) -> int:
    """Tokens of their definitions, at most."""
    return sum(num_bytes(text_of(tool)) for tool in tools)


def _most_uses(body: Json, tool: Json, is_chat: bool) -> _End | None:
    """By the field that whoever runs it is held to: none bounds it that is not sent, or that nobody there knows."""
    own, of_all = (
        most if type(most) is int and most > 0 else None for most in (tool.get("max_uses"), body.get(_MOST_CALLS))
    )
    if not _is_claudes(tool):
        return None if of_all is None else _End(of_all)
    if own is not None:
        return _End(own)
    is_counted = str(tool.get("type")).startswith(tuple(PAGES))
    return _End(of_all, is_held=True) if is_chat and is_counted and of_all is not None else None


def _is_claudes(tool: Json) -> bool:
    return _CLAUDES.fullmatch(str(tool.get("type"))) is not None


def _compacts(body: Json) -> bool:
    """Its other edits take things out of the prompt, which costs nothing. What cannot be read may be anything."""
    given = body[COMPACTION]
    edits = given.get("edits", []) if isinstance(given, dict) else given
    if not isinstance(edits, list):
        return True
    return any(not isinstance(one, dict) or not str(one.get("type")).startswith("clear_") for one in edits)


def _is_on(value: Any) -> bool:
    """A field that is there and does not say no."""
    return value is not None and value is not False and not (isinstance(value, dict) and value.get("mode") == "off")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _parts(message: Json) -> list[Json]:
    """Of a message, a block or an item."""
    return [part for name in ("content", "output") for part in _listed(message.get(name)) if isinstance(part, dict)]
