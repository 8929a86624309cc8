"""What is told of requests, in the config: log, metrics, spans and webhooks."""

from typing import Literal
from urllib.parse import urlsplit

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError
from anabranch.gateway.config.secret import Secret, is_reference
from anabranch.sockets import http_parts


@configclass
class LogConfig(Config):
    """What is written down.

    Attributes:
        level: of the log on stderr.
        prompts: keep texts of requests and answers in the store, for ``gateway fit`` to learn from, and for strategies that show them to
            models (ic_cache), which cannot be without; otherwise token counts only. A sender that says ``store: false`` is left out.
        decisions: keep why each model was chosen.
        access: file of the access log, one JSON line a request (who by id, model, status, tokens, cost, times; no texts); ``-`` is stdout,
            None is none. SIGHUP has it opened anew, for whoever moves it away.
        keep_days: age at which ledger rows, decisions, texts, examples and feedback are deleted; None keeps them.
    """

    level: Literal["debug", "info", "warning", "error"] = "warning"
    prompts: bool = False
    decisions: bool = True
    access: str | None = Field(default=None, min_length=1)
    keep_days: int | None = Field(default=None, ge=1)


@configclass
class MetricsConfig(Config):
    """What ``/metrics`` counts.

    Attributes:
        senders: keys, and teams, that are counted by their names; more are counted together as ``other``. 0 counts nobody by name.
    """

    senders: int = Field(default=100, ge=0, le=10_000)


@configclass
class OtelConfig(Config):
    """Where spans go: a collector of OpenTelemetry. Needs the extra ``otel``. No text of a request or an answer is sent.

    Attributes:
        endpoint: of OTLP over HTTP, without ``/v1/traces``.
        headers: to send along, each a secret by reference.
        service: what the collector calls this gateway.
        sample: share of the traces that begin here which are recorded; one that a request came with is recorded if its sender does.
    """

    endpoint: str = "http://127.0.0.1:4318"
    headers: dict[str, Secret] = Field(default_factory=dict)
    service: str = Field(default="anabranch-gateway", min_length=1)
    sample: float = Field(default=1.0, ge=0, le=1)

    def __post_init__(self) -> None:
        parts = http_parts(self.endpoint)
        if parts is None or "@" in parts.netloc or parts.query:
            raise ConfigError("endpoint must be a URL such as http://127.0.0.1:4318, without a name or password")


@configclass
class WebhookConfig(Config):
    """Who is told, by a POST, that a budget has reached a share of its limit: once for each budget, period and share.

    Attributes:
        url: ``https``; what follows its host is never shown. ``env:VARIABLE`` where it is a secret as a whole.
        secret: each POST is signed with it (HMAC-SHA256).
        shares: of the limit.
        subjects: of budgets, such as ``team:blue``; empty for all.
        private: it may be on this machine or a private network, and ``http``. Without it, a name that leads there is not called.
    """

    url: str
    secret: Secret
    shares: tuple[float, ...] = Field(default=(0.5, 0.8, 1.0), min_length=1)
    subjects: tuple[str, ...] = ()
    private: bool = False

    def __post_init__(self) -> None:
        odd = next((share for share in self.shares if not 0 < share <= 10), None)
        if odd is not None:
            raise ConfigError(f"shares has {odd!r}; it must be above 0 and at most 10 (1 is the whole limit)")
        if not is_reference(self.url):
            check_webhook_url(self.url, private=self.private)


def check_webhook_url(url: str, *, private: bool) -> None:
    """Raises ConfigError, without the URL, which may hold a secret, for one that may not be called."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port == 0 or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError("url cannot be read; write https://HOST/PATH, or env:VARIABLE")
    if parts.scheme not in ("https", "http") or (parts.scheme == "http" and not private):
        raise ConfigError("url must begin with https:// (http:// only with private = true)")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("url has a name or a password in it; what is sent is signed with secret")
