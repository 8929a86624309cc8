"""Azure OpenAI: OpenAI's bodies under Azure's addresses and keys.

    classic     BASE/openai/deployments/NAME/chat/completions?api-version=2024-10-21     the deployment is in the address
    v1          BASE/openai/v1/chat/completions                                          it is the model of the body

A key goes as ``api-key``; a token of Microsoft Entra ID (``auth = "token"``) as ``Authorization: Bearer``.
"""

import re
from typing import Any, Literal
from urllib.parse import quote

from anabranch.config import configclass
from anabranch.errors import ConfigError
from anabranch.gateway.providers.openai import PATHS, OpenAI

_VERSION = re.compile(r"[A-Za-z0-9.-]+")


class Azure(OpenAI, kind="azure"):
    """Talks to a deployment of Azure OpenAI."""

    @configclass
    class Config(OpenAI.Config):
        """Where it is; ``model`` is the name of the deployment.

        Attributes:
            base_url: of the resource, such as ``https://NAME.openai.azure.com``; nothing after the host but a proxy's path.
            api_version: of the classic API; ``v1`` (or ``latest`` and ``preview``) is the newer one, whose address names no deployment.
            auth: what ``key_env`` holds: a ``key`` of the resource, or a ``token`` of Entra ID.
        """

        base_url: str = ""
        key_env: str | None = "AZURE_OPENAI_API_KEY"
        api_version: str = "2024-10-21"
        auth: Literal["key", "token"] = "key"

        def __post_init__(self) -> None:
            if not self.base_url:
                raise ConfigError("base_url is empty; it must be the resource's, such as https://NAME.openai.azure.com")
            super().__post_init__()
            if not _VERSION.fullmatch(self.api_version):
                raise ConfigError(f"api_version is {self.api_version!r}; it must be a date such as 2024-10-21, or v1")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # The newer API's own address is often what people have at hand.
        base = re.sub(r"/openai(/v1)?$", "", config.base_url.rstrip("/"))
        version = config.api_version
        if version in ("v1", "latest", "preview"):
            query = "?api-version=preview" if version == "preview" else ""
            self._urls = {endpoint: f"{base}/openai/v1{path}{query}" for endpoint, path in PATHS.items()}
        else:
            at = f"{base}/openai/deployments/{quote(config.model, safe='')}"
            self._urls = {endpoint: f"{at}{path}?api-version={version}" for endpoint, path in PATHS.items()}

    def _authorization(self) -> dict[str, str]:
        if self._key is None:
            return {}
        key = self._key.reveal()
        return {"api-key": key} if self.config.auth == "key" else {"authorization": f"Bearer {key}"}
