"""Conversations as prompts: a folder's own Jinja template, ChatML, or plain lines."""

from collections.abc import Sequence

from anabranch.data.templates import render_template
from anabranch.errors import TokenizerError


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
