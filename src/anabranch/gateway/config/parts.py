"""What a gateway is made of: models and their deployments, strategies, limits. One file of these is one gateway."""

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError, InputError
from anabranch.gateway.config.ab import is_key_or_team
from anabranch.gateway.config.secret import Secret, is_reference
from anabranch.gateway.providers.provider import Provider
from anabranch.gateway.store.speaking import check_speaks_for
from anabranch.routers.money import Price

Balance = Literal["weighted", "least_in_flight", "latency", "tpm", "price"]

# Whose scores of a request move what a strategy learns.
Who = Literal["own", "team", "any", "admin", "none"]


@configclass
class DeploymentConfig(Config):
    """One place where a model runs.

    Attributes:
        name: in logs, headers and metrics; unique in the gateway. Empty: the model's name, with its place if there are several.
        provider: how to speak to it.
        weight: share of requests among deployments of one model, relative to the others'.
        timeout_s: seconds one attempt at a whole answer may take; None takes the model's, and where that is None too, leaves it to the
            deadline of the request.
        first_token_timeout_s: seconds until a stream's first token; None takes the model's, then ``timeout_s``, and where that is None
            too, a third of the deadline, so that a silent upstream leaves time for another.
        idle_timeout_s: seconds between two events of a stream; None takes the model's, then ``timeout_s``.
        rpm: requests a minute it takes; None is no limit.
        tpm: tokens a minute it takes; None is no limit.
        max_in_flight: requests at a time; None is no limit.
        price: if it is not the model's.
    """

    provider: Provider.Config
    name: str = ""
    weight: float = Field(default=1.0, ge=0)
    timeout_s: float | None = Field(default=None, gt=0)
    first_token_timeout_s: float | None = Field(default=None, gt=0)
    idle_timeout_s: float | None = Field(default=None, gt=0)
    rpm: int | None = Field(default=None, ge=1)
    tpm: int | None = Field(default=None, ge=1)
    max_in_flight: int | None = Field(default=None, ge=1)
    price: Price | None = None


@configclass
class ModelConfig(Config):
    """A model that requests may name and strategies may choose; with several deployments, a group.

    Attributes:
        name: what requests call it.
        aliases: other names of it.
        price: of its tokens, in nano-dollars per million. Files may write dollars: ``price = {input_usd = 0.15, output_usd = 0.6}``.
            None takes each deployment's from the price list that ships, if that knows it. ``{}`` is free.
        context: most prompt and completion tokens; None if unknown.
        max_tokens: most completion tokens of one answer: reserved for, and sent with, requests that name no limit; None if unknown.
        parameters: billions of parameters; None if unknown.
        description: a few words on what it is good at, for strategies that read them.
        tokenizer: path of a ``tokenizer.json`` to count prompts with; None estimates.
        balance: how requests are spread over its deployments; None takes the gateway's.
        deadline_s: seconds that a request which goes to it first may take in all; None takes the gateway's. Models that think take minutes.
        timeout_s, first_token_timeout_s, idle_timeout_s: of deployments that say none of their own.
        deployments: at least one.
    """

    name: str = Field(min_length=1, max_length=200)
    aliases: tuple[str, ...] = ()
    price: Price | None = None
    context: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    parameters: float | None = Field(default=None, gt=0)
    description: str = ""
    tokenizer: str | None = None
    balance: Balance | None = None
    deadline_s: float | None = Field(default=None, gt=0)
    timeout_s: float | None = Field(default=None, gt=0)
    first_token_timeout_s: float | None = Field(default=None, gt=0)
    idle_timeout_s: float | None = Field(default=None, gt=0)
    deployments: tuple[DeploymentConfig, ...] = Field(min_length=1)

    def deployment_name(self, at: int) -> str:
        """Of the deployment in place ``at``."""
        return self.deployments[at].name or (self.name if len(self.deployments) == 1 else f"{self.name}#{at}")


@configclass
class StrategyConfig(Config):
    """A way of routing that requests may name as ``auto/NAME``.

    Exactly one of ``use`` and ``router`` is given. Files may write ``kind = "knn"`` and the strategy's fields beside it, instead of
    ``use`` and ``fields``.

    Attributes:
        use: name of a strategy or predictor (`anabranch.routers.strategies.names`).
        fields: of its config.
        trade_off: score given up to save a dollar; None takes the strategy's own.
        budget_usd: dollars a query, on average, that a fitted router may spend: the trade-off that kept it as it was fitted. None for none.
        router: a fitted router's file, or a folder of them (``anabranch gateway fit``): the one of the strategy's name, else what
            ``anabranch gateway eval`` recommends of them, else the only one.
        models: those it may choose among; empty for all.
        timeout_s: seconds a decision may take before the default strategy decides instead.
        learns_from: whose scores it learns from; None takes ``feedback.who``.
        learns_of: whose requests it learns of, as ``key:ID`` or ``team:NAME``; empty for all.
    """

    use: str | None = None
    fields: dict[str, Any] = Field(default_factory=dict)
    trade_off: float | None = Field(default=None, ge=0)
    budget_usd: float | None = Field(default=None, gt=0)
    router: str | None = None
    models: tuple[str, ...] = ()
    timeout_s: float = Field(default=0.05, gt=0)
    learns_from: Who | None = None
    learns_of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.use is None) == (self.router is None):
            raise ConfigError(
                "a strategy needs one of kind (a strategy by name) and router (a folder of anabranch gateway fit)"
            )
        if self.router is not None and self.fields:
            raise ConfigError(
                f"fields are {', '.join(self.fields)}, but a fitted router brings its own; leave them out"
            )
        if self.budget_usd is not None and (self.router is None or self.trade_off is not None):
            raise ConfigError(
                f"budget_usd is {self.budget_usd:g}, and finds the trade_off of a fitted router; give router and no trade_off, or leave it "
                "out (fields of some strategies have a budget)"
            )
        odd = next((one for one in self.learns_of if not is_key_or_team(one)), None)
        if odd is not None:
            raise ConfigError(f"learns_of has {odd!r}; write key:ID or team:NAME")


@configclass
class RetryConfig(Config):
    """When an attempt fails in a way that another may not.

    Attributes:
        attempts: most calls of one model for one request, the first included.
        base_s, cap_s: the wait before retry k is uniform in 0 .. min(cap, base * 2^k) seconds.
        budget: most retries, fallbacks and hedges as a share of requests, over ``window_s`` seconds, so that an outage does not
            multiply load; 0 for none at all. Each sender has a right to that share of its own requests.
        least: so many there may be in any window, however quiet it is; of several senders each has its part.
        window_s: see ``budget``.
    """

    attempts: int = Field(default=3, ge=1, le=20)
    base_s: float = Field(default=0.25, ge=0)
    cap_s: float = Field(default=8.0, ge=0)
    budget: float = Field(default=0.2, ge=0, le=10)
    least: int = Field(default=10, ge=0)
    window_s: float = Field(default=10.0, gt=0)


@configclass
class HedgeConfig(Config):
    """A second attempt elsewhere while the first is slow; the first to bring a token wins, both are paid.

    Attributes:
        quantile: of recent times to the first token, after which it starts.
        min_s: never earlier than this.
        samples: times that must be known first.
    """

    quantile: float = Field(default=0.95, gt=0, lt=1)
    min_s: float = Field(default=0.05, ge=0)
    samples: int = Field(default=20, ge=1)


@configclass
class LostConfig(Config):
    """What calls are charged that brought nothing: attempts that took too long, hedges that lost, answers whose client has gone.

    Providers bill them. They are charged the most that may be billed, until the provider says less.

    Attributes:
        read_on_s: seconds that a whole answer is read on for what it costs, while what was set aside for it stays so; 0 for not at all.
        read_on: most answers that are read on at a time.
        margin_s: seconds of tokens that a provider may make after a stream was dropped.
        bytes_per_token: what text is charged by whose tokens the provider did not tell. No tokenizer makes a token of less than a byte, so
            that 1 covers every bill; English has four, and numbers or code may have little more than one.
    """

    read_on_s: float = Field(default=60.0, ge=0)
    read_on: int = Field(default=256, ge=0)
    margin_s: float = Field(default=1.0, ge=0)
    bytes_per_token: float = Field(default=1.0, ge=1, le=16)


@configclass
class BreakerConfig(Config):
    """When a deployment is left alone.

    Attributes:
        failures: at least so many in the window,
        rate: and at least this share of its calls, open the breaker.
        window_s: sliding.
        open_s, max_open_s: open for min(open_s * 2^n, max_open_s) seconds the n-th time in a row.
        probes: requests let through at once when half open.
        successes: of probes that close it.
        senders: whose attempts took too long count as failures of a deployment that answers others once they are so many; teams, else
            users, else keys.
    """

    failures: int = Field(default=5, ge=1)
    rate: float = Field(default=0.5, gt=0, le=1)
    window_s: float = Field(default=30.0, gt=0)
    open_s: float = Field(default=5.0, gt=0)
    max_open_s: float = Field(default=300.0, gt=0)
    probes: int = Field(default=1, ge=1)
    successes: int = Field(default=2, ge=1)
    senders: int = Field(default=8, ge=1)


@configclass
class LimitsConfig(Config):
    """What one request, and one sender, may ask for.

    Attributes:
        body_bytes: of a request.
        bodies_bytes: of all bodies that come, and of large ones (over 256 KiB) until their requests end, in one process; more get 429. A
            key may have half of what others leave. At least four times ``body_bytes``, so that beside a key that takes all it may there is
            room for one of any size. None is 256 MiB, or four times ``body_bytes`` if that is more.
        header_timeout_s, body_timeout_s: seconds in which headers and body must have come.
        max_tokens: completion tokens reserved for a request that names none, of a model that says nothing.
        most_tokens: largest ``max_tokens`` a request may name.
        in_flight: requests at a time; more get 429.
        rpm, tpm: requests and tokens a minute of a key that has no limits of its own; None is no limit.
        max_in_flight: requests at a time of such a key; None is no limit but ``in_flight``, which is of all together.
        strategy_calls: calls of models that a strategy may make for one request, to decide or to judge an answer.
        strategy_calls_s: seconds of a request in which such calls may be under way; the rest is for the answer.
        request_usd: dollars that one request may cost in all, those calls among them; None leaves that to budgets.
        allow_unpriced: take requests of which it is not known what they cost: fields that change a price that the config does not name
            (``service_tier``, searches of the web, sound), and models without a price where a budget applies. They are charged what is
            known, which may be less than the bill.
    """

    body_bytes: int = Field(default=16 << 20, ge=1)
    bodies_bytes: int | None = Field(default=None, ge=4)
    header_timeout_s: float = Field(default=10.0, gt=0)
    body_timeout_s: float = Field(default=30.0, gt=0)
    max_tokens: int = Field(default=4096, ge=1)
    most_tokens: int = Field(default=1_000_000, ge=1)
    in_flight: int = Field(default=1024, ge=1)
    rpm: int | None = Field(default=None, ge=1)
    tpm: int | None = Field(default=None, ge=1)
    strategy_calls: int = Field(default=64, ge=0)
    strategy_calls_s: float = Field(default=60.0, gt=0)
    request_usd: float | None = Field(default=None, gt=0, le=1e6)
    max_in_flight: int | None = Field(default=None, ge=1)
    allow_unpriced: bool = False

    def __post_init__(self) -> None:
        least = 4 * self.body_bytes
        if self.bodies_bytes is not None and self.bodies_bytes < least:
            raise ConfigError(
                f"bodies_bytes is {self.bodies_bytes:,}; it needs at least {least:,}, four times body_bytes ({self.body_bytes:,}), so that "
                "a key that takes all it may leaves room for a body of another"
            )

    @property
    def room_for_bodies(self) -> int:
        """``bodies_bytes``, or what stands in place of it."""
        return max(256 << 20, 4 * self.body_bytes) if self.bodies_bytes is None else self.bodies_bytes


@configclass
class KeysConfig(Config):
    """What holds of keys that say nothing else.

    Attributes:
        speaks_for: whose users and tags requests may name (``user``, ``x-tags``), so that they spend their budgets and stand in their
            records: ``user:NAME``, ``tag:NAME``, ``user:*``, ``tag:*``, ``*``. Other names are the key's own: ``KEY/NAME``. None is nobody
            for a key; a request without one may name everybody as long as the store has no keys.
    """

    speaks_for: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.speaks_for is not None:
            try:
                check_speaks_for("keys.speaks_for", self.speaks_for)
            except InputError as error:
                raise ConfigError(str(error)) from None


@configclass
class CacheConfig(Config):
    """Answers kept. Nothing is shared between keys.

    Attributes:
        exact: answer an identical request again, if its temperature is 0 or it asks for that.
        semantic: answer a request that means the same; needs an embedder.
        threshold: least cosine of two requests that mean the same.
        ttl_s: seconds an answer is kept.
        max_entries, max_bytes: of all answers kept; the least recently used go first.
    """

    exact: bool = True
    semantic: bool = False
    threshold: float = Field(default=0.95, gt=0, le=1)
    ttl_s: float = Field(default=3600.0, gt=0)
    max_entries: int = Field(default=10_000, ge=1)
    max_bytes: int = Field(default=64 << 20, ge=1)


@configclass
class AdminConfig(Config):
    """The admin interface, apart from the one for requests.

    Attributes:
        key: what opens it; None leaves it closed but for the page on a loopback address.
        host, port: where it listens; port None shares the port of requests (a key is needed then).
    """

    key: Secret | None = None
    host: str = "127.0.0.1"
    port: int | None = Field(default=None, ge=0, le=65535)


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
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
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


@configclass
class SharedConfig(Config):
    """Where processes count together: rates and requests under way of keys, breakers, answers of the exact cache.

    Needs the extra ``redis``. While Redis is away each process goes on with its own.

    Attributes:
        url: ``redis://HOST:PORT/DATABASE``, ``rediss://`` (TLS) or ``unix://PATH``; ``env:VARIABLE`` where it holds a password.
        prefix: of all keys, so that several gateways can share one Redis and nothing else.
        timeout_s: longest that a request waits for it.
        answers: of the exact cache are shared; those of more than ``answer_bytes`` are not.
    """

    url: str
    prefix: str = "anabranch"
    timeout_s: float = Field(default=0.2, gt=0, le=5)
    answers: bool = True
    answer_bytes: int = Field(default=1 << 20, ge=1)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", self.prefix):
            raise ConfigError(f"prefix is {self.prefix!r:.100}; it must be 1 to 64 of letters, digits and _ . -")
        if not is_reference(self.url):
            check_redis_url(self.url)

    def revealed(self) -> str:
        """The URL. Raises ConfigError for a variable that is not set, or that holds no such URL."""
        if not is_reference(self.url):
            return self.url
        url = Secret(self.url, "shared.url").reveal()
        check_redis_url(url)
        return url


def check_redis_url(url: str) -> None:
    """Raises ConfigError, without the URL, which may hold a password, for one that leads to no Redis."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ConfigError("url cannot be read; write redis://HOST:6379/0, or env:VARIABLE") from None
    is_one = (
        bool(parts.hostname) if parts.scheme in ("redis", "rediss") else parts.scheme == "unix" and bool(parts.path)
    )
    if not is_one:
        raise ConfigError("url must be redis://HOST:6379/0, rediss://HOST:6379/0 or unix://PATH, or env:VARIABLE")


@configclass
class FeedbackConfig(Config):
    """Who moves what strategies learn, and how far.

    An outcome that nobody scored, with its cost and its time, counts as what the key of its request says.

    Attributes:
        who: whose scores of a request count. ``own``: those of the key it came with; ``team``: also of that key's team; ``any``: of every
            key; ``admin``: of operators' keys alone; ``none``: nobody's. Operators' keys count with all but the last. Whoever made a
            request may score it in any case: the store keeps that, whether or not a strategy learns from it.
        share: most of the last ``window`` outcomes taken in by one strategy that may be of one key. Where fewer keys than that asks for
            take part, each may have an equal part; a key that is alone has no limit, and 1 is none for anybody.
        window: see ``share``.
        free: outcomes an hour that a key may add whatever the others do, so that somebody can be the first.
    """

    who: Who = "own"
    share: float = Field(default=0.2, gt=0, le=1)
    window: int = Field(default=1000, ge=10)
    free: int = Field(default=60, ge=0)


@configclass
class LearningConfig(Config):
    """What strategies may have asked beside requests, to learn: better answers to examples, second answers, what answers are worth.

    Attributes:
        judge: model that says what answers are worth; "" has nothing asked.
        budget_usd: dollars a day for all of it, the judge's too; the budget of the tag ``learning``.
    """

    judge: str = ""
    budget_usd: float = Field(default=1.0, ge=0)
