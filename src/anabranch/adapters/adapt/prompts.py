"""What is written around a prompt: while an adapter learns, and by whoever asks it afterwards."""

from collections.abc import Iterable
from pathlib import Path

from anabranch.adapters.folder_files import PROMPT_FILE
from anabranch.data import Tokenizer
from anabranch.errors import CheckpointError, ConfigError
from anabranch.files import atomic_write_json, read_json

__all__ = [
    "CHAT",
    "DEFAULT",
    "PROMPT_FILE",
    "asked_ids",
    "check_template",
    "common_template",
    "template_in",
    "write_template",
]

# The template that is the model's own form of a chat.
CHAT = "chat"
# Where nobody says another.
DEFAULT = "{prompt}\n"


def check_template(template: str, name: str = "template") -> None:
    """Raise ConfigError for a template without a place for the prompt; ``name`` is whose value it is."""
    if template != CHAT and "{prompt}" not in template:
        raise ConfigError(
            f"{name} is {template!r}; {{prompt}} in it stands for what is asked, or it is {CHAT!r}, the model's own form of a chat"
        )


def asked_ids(tokenizer: Tokenizer, prompt: str, template: str) -> list[int]:
    """The tokens of ``prompt`` as the template writes it: with `CHAT` those that `anabranch chat` and a server's chats give a model."""
    if template == CHAT:
        return tokenizer.encode_chat(tokenizer.apply_chat_template([{"role": "user", "content": prompt}]))
    # Not format: a prompt may hold braces.
    return tokenizer.encode_prompt(template.replace("{prompt}", prompt))


def write_template(folder: Path, template: str) -> None:
    """Note beside an adapter how its prompts were written."""
    atomic_write_json(folder / PROMPT_FILE, {"template": template})


def template_in(folder: str | Path) -> str | None:
    """How the prompts of an adapter were written; None where nothing is noted. Raises CheckpointError for a note that says nothing."""
    path = Path(folder) / PROMPT_FILE
    if not path.is_file():
        return None
    said = read_json(path)
    template = said.get("template") if isinstance(said, dict) else None
    if not isinstance(template, str):
        raise CheckpointError(f'{path} must be {{"template": TEXT}}; remove it, or mend it')
    try:
        check_template(template)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; remove it, or mend it") from None
    return template


def common_template(folders: Iterable[str | Path]) -> str | None:
    """What the notes of several adapters say alike; None where one says nothing, or another thing."""
    found = {template_in(folder) for folder in folders}
    return found.pop() if len(found) == 1 else None
