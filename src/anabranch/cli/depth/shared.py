"""What the commands of ``anabranch depth`` have in common: which questions they ask, and of which model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import load
from anabranch.errors import ConfigError, DataError

if TYPE_CHECKING:
    from anabranch.data import Tokenizer
    from anabranch.depth.dr_llm import Question
    from anabranch.depth.stack import BlockStack

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Questions as JSON lines (prompt, answer, perhaps options), or plain text. Default: the held-out text of the "
        "run.",
    ),
]
Source = Annotated[str | None, typer.Argument(metavar="DATA", help="Same as --data.")]
Context = Annotated[int, typer.Option(metavar="L", min=1, help="For text: tokens in a prompt, which the routers see.")]
After = Annotated[
    int, typer.Option(metavar="N", min=1, help="For text: number of tokens after the prompt that are predicted.")
]
Limit = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Maximum number of questions. Default: all questions of a file, 256 from text."
    ),
]

# Questions of a text unless somebody says otherwise.
OF_TEXT = 256


def one_of(source: str | None, data: str | None, name: str = "--data") -> str | None:
    """The file that is meant, whether it was given as an argument or as an option. Raises ConfigError for both."""
    if source is not None and data is not None:
        raise ConfigError(f"DATA is {source!r} and {name} is {data!r}; give one of them")
    return data if source is None else source


def stack_at(model: str, dtype: str | None, device: str | None) -> tuple[BlockStack, Tokenizer]:
    """The blocks of a model, in evaluation, and its tokenizer."""
    from anabranch.depth.stack import stack_of

    network, tokenizer = load(model, dtype, device)
    network.check_causal()
    return stack_of(network), tokenizer


def questions_of(
    model: str,
    stack: BlockStack,
    tokenizer: Tokenizer,
    data: str | None,
    *,
    context: int,
    after: int,
    limit: int | None,
) -> tuple[list[Question], str]:
    """(questions, the name of the data). Windows of a text are questions: so many tokens of prompt, and those after them.

    Raises DataError for a file that cannot be read or holds none, and text that is too short.
    """
    import torch

    from anabranch.cli.corpora import run_of, windows_of
    from anabranch.data.reading import missing_corpus
    from anabranch.depth.dr_llm import contexts, read_questions
    from anabranch.depth.dr_llm.questions import is_questions

    if data is not None and is_questions(data):
        return read_questions(data, tokenizer, limit=limit, vocabulary=stack.vocabulary), data
    if data is not None and not Path(data).exists():
        raise missing_corpus(data)
    length = context + after - 1
    if length + 1 > stack.max_positions:
        raise ConfigError(
            f"--context is {context}, and {model} is meant for {stack.max_positions} positions; take fewer"
        )
    windows, name = windows_of(data, run_of(model), tokenizer, length, (limit or OF_TEXT) * length)
    whole: list[Any] = [
        torch.cat([batch.token_BL, batch.target_BL[:, -1:]], dim=1)
        for batch in windows
        if batch.token_BL.shape[1] == length
    ]
    if not whole:
        raise DataError(f"{name} has no {length + 1} tokens in a row; give more text, or a smaller --context")
    return contexts(torch.cat(whole)[: limit or OF_TEXT], after=after), name
