"""`render`: the prompt of a conversation, by the tokenizer's own template where it has one.

Messages are those of OpenAI's chat API. A template that knows no tools gets them as text, in the form that Hermes and Qwen models
are trained on: the definitions in the system message, calls as ``<tool_call>{json}</tool_call>``, results as ``<tool_response>``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from anabranch.data.templates import TemplatesBusyError, render_template, template_variables
from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import InputError, TokenizerError
from anabranch.serving.chat.messages import read_messages
from anabranch.serving.chat.tools import call_text, read_tools, system_text

__all__ = ["render", "takes_tools"]


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
    **values: Any,
) -> str:
    """The prompt; `Tokenizer.encode_chat` makes ids of it.

    Args:
        tokenizer: the model's; without a template of its own ChatML where the vocabulary has its tokens, else plain ``User:`` lines.
        messages: see `anabranch.serving.chat.messages.read_messages`.
        tools: {"type": "function", "function": {"name", "description", "parameters"}}.
        add_generation_prompt: end with the beginning of the assistant's turn.
        values: more for the template (``enable_thinking``).

    Raises InputError for a message that is malformed, or that the template refuses, TemplatesBusyError if no process was free to render.
    """
    read_tools(tools)
    said = read_messages(messages)
    template = tokenizer.chat_template
    if template is None or not takes_tools(tokenizer):
        said = _as_text(said, tools)
    try:
        if template is None:
            return tokenizer.apply_chat_template(said, add_generation_prompt=add_generation_prompt)
        special = {f"{name}_token": text for name, text in tokenizer.special_names.items()}
        own = {"messages": said, "tools": list(tools) or None, "add_generation_prompt": add_generation_prompt}
        return render_template(template, **{**special, **values, **own})
    except TemplatesBusyError:
        raise
    except TokenizerError as error:
        raise InputError(f"messages: {error}") from None


def takes_tools(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's template renders tools itself. Raises InputError for a template that cannot be read."""
    if tokenizer.chat_template is None:
        return False
    try:
        return "tools" in template_variables(tokenizer.chat_template)
    except TemplatesBusyError:
        raise
    except TokenizerError as error:
        raise InputError(str(error)) from None


def _as_text(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of system, user and assistant alone, with tools, calls and results as text in them."""
    result: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            answer = f"<tool_response>\n{content}\n</tool_response>"
            # Results of calls made together are one turn of the user's.
            if result and result[-1].get("is_response"):
                result[-1]["content"] += f"\n{answer}"
            else:
                result.append({"role": "user", "content": answer, "is_response": True})
            continue
        calls = [
            call_text(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])
        ]
        result.append({"role": role, "content": "\n".join([*([content] if content or not calls else []), *calls])})
    if tools:
        text = system_text(tools)
        if result[0]["role"] == "system":
            result[0]["content"] = f"{result[0]['content']}\n\n{text}".lstrip()
        else:
            result.insert(0, {"role": "system", "content": text})
    return [{"role": message["role"], "content": message["content"]} for message in result]
