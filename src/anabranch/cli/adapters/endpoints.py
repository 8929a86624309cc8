"""Options of an endpoint that writes instructions, and of one that makes vectors of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.errors import ConfigError

if TYPE_CHECKING:
    from anabranch.adapters.glider import ChatWriter, EndpointEmbedder

Writer = Annotated[
    str | None,
    typer.Option(
        "--writer", metavar="URL", help="OpenAI-compatible endpoint that writes instructions, http://HOST:PORT/v1."
    ),
]
WriterModel = Annotated[
    str | None, typer.Option("--writer-model", metavar="NAME", help="Name of the model at that endpoint.")
]
Embedder = Annotated[
    str | None,
    typer.Option(
        "--embedder",
        metavar="URL",
        help="OpenAI-compatible endpoint for text embeddings. Default: counts of words, word pairs and letters.",
    ),
]
EmbedderModel = Annotated[
    str | None, typer.Option("--embedder-model", metavar="NAME", help="Name of the model at that endpoint.")
]
KeyEnv = Annotated[
    str | None,
    typer.Option("--key-env", metavar="NAME", help="Environment variable that holds the endpoints' API key."),
]


def writer_of(url: str | None, model: str | None, key_env: str | None) -> ChatWriter | None:
    """Who writes instructions; None where nobody is named. Raises ConfigError for half of an endpoint."""
    if not _is_whole("--writer", url, model):
        return None
    from anabranch.adapters.glider import ChatWriter

    return ChatWriter(str(url), str(model), key_env=key_env)


def embedder_of(url: str | None, model: str | None, key_env: str | None) -> EndpointEmbedder | None:
    """Who makes vectors; None where nobody is named. Raises ConfigError for half of an endpoint."""
    if not _is_whole("--embedder", url, model):
        return None
    from anabranch.adapters.glider import EndpointEmbedder

    return EndpointEmbedder(str(url), str(model), key_env=key_env)


def _is_whole(option: str, url: str | None, model: str | None) -> bool:
    if (url is None) != (model is None):
        said, missing = (option, f"{option}-model") if model is None else (f"{option}-model", option)
        raise ConfigError(f"{said} is given, but {missing} is not; an endpoint needs both an address and a model")
    return url is not None
