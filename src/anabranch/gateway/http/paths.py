"""Paths as clients write them, and as the table of routes has them.

/openai/deployments/NAME/chat/completions    Azure's client; ``?api-version=`` is not looked at
/openai/v1/X, /openai/X                      its newer paths, and what belongs to no deployment
/health/liveliness, /liveness, /readiness    probes of charts that were written for LiteLLM's proxy
"""

from anabranch.gateway.providers.media import PATHS as MEDIA

_AZURE, _DEPLOYMENTS = "/openai", "/openai/deployments/"
_PROBES = {"/health/liveliness": "/health", "/health/liveness": "/health", "/health/readiness": "/ready"}

# What is asked of a deployment; of two that a path ends in, the longer one is meant.
_ASKED = sorted(("/chat/completions", "/completions", "/embeddings", *MEDIA.values()), key=len, reverse=True)


def plain(path: str) -> str:
    """A path without what clients of others write before it: ``/v1/...`` for Azure's, and the probe that another name is for."""
    if path.startswith(_DEPLOYMENTS):
        return path if (found := _of_deployment(path)) is None else f"/v1{found[1]}"
    if path.startswith(f"{_AZURE}/v1/"):
        return path[len(_AZURE) :]
    if path.startswith(f"{_AZURE}/"):
        return f"/v1{path[len(_AZURE) :]}"
    return _PROBES.get(path, path)


def deployment_of(path: str) -> str | None:
    """The model that a path names; None if none is.

    Args:
        path: without escapes, as `plain` is given it.
    """
    found = _of_deployment(path.rstrip("/"))
    return None if found is None else found[0]


def _of_deployment(path: str) -> tuple[str, str] | None:
    """Its name, and what is asked of it."""
    if not path.startswith(_DEPLOYMENTS):
        return None
    rest = path[len(_DEPLOYMENTS) :]
    asked = next((one for one in _ASKED if rest.endswith(one)), None)
    return None if asked is None or asked == rest else (rest[: -len(asked)], asked)
