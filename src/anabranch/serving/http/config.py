"""`HttpConfig`: what a server is told: where it listens, whom it answers, how much it takes."""

from typing import Literal

from anabranch.bounds import shown
from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError
from anabranch.serving.core.admission import AdmissionConfig
from anabranch.sockets import check_names
from anabranch.web.json_size import MOST_PARTS, MOST_VALUES

ReasoningFormat = Literal["auto", "none", "think", "magistral", "harmony"]
ToolFormat = Literal[
    "auto",
    "hermes",
    "llama3",
    "mistral",
    "mistral_args",
    "deepseek_v3",
    "deepseek_v31",
    "pythonic",
    "qwen3_coder",
    "harmony",
]


@configclass
class Limits(Config):
    """How much one request may ask for, and how long it may take.

    Attributes:
        most_n: largest ``n``.
        body_bytes: largest body.
        bodies_bytes: of all bodies that come, or wait to be read, together; of what the others leave, one key (one address, where there
            are no keys) may have the part ``admission.key_share``. A body beyond that is refused before it is read.
        answers_bytes: of all that answers are made of, from when it is made until it has been read; of what the others leave, one key (one
            address) may have that part of it too. More is refused.
        body_values: values in a body that stand side by side in lists and objects, such as token ids; where the model has more positions
            than that, as many as it has.
        body_parts: lists, objects and names in a body, together. What a parser makes of more would hold up all other requests.
        connections: that are open at once. On those beyond it only ``/health/live`` answers, all else is 503.
        address_share: of the connections that others leave, the part that one address may have; 1 behind a proxy, where all come from one.
        header_timeout_s: the first request's head has to come within it.
        body_timeout_s: a body has to come within it.
        deadline_s: seconds a request may take where it gives no deadline; None for no bound. The default is what OpenAI's clients wait.
        stream_events: outputs of one sequence that are kept for a reader who is slow; then its generation pauses.
        stall_s: an answer, whole or streamed, that is not read for so long is cancelled; so is a whole one whose reader keeps it waiting
            for longer than that and a second for each 32 KiB.
    """

    most_n: int = Field(default=16, ge=1, le=128)
    body_bytes: int = Field(default=8 << 20, ge=1024)
    bodies_bytes: int = Field(default=128 << 20, ge=1024)
    answers_bytes: int = Field(default=512 << 20, ge=1 << 20)
    body_values: int = Field(default=MOST_VALUES, ge=1024)
    body_parts: int = Field(default=MOST_PARTS, ge=1024)
    connections: int = Field(default=2048, ge=1)
    address_share: float = Field(default=0.5, gt=0, le=1)
    header_timeout_s: float = Field(default=10.0, gt=0)
    body_timeout_s: float = Field(default=30.0, gt=0)
    deadline_s: float | None = Field(default=600.0, gt=0)
    stream_events: int = Field(default=256, ge=1)
    stall_s: float = Field(default=30.0, gt=0)

    def __post_init__(self) -> None:
        if self.bodies_bytes < self.body_bytes:
            raise ConfigError(
                f"bodies_bytes is {self.bodies_bytes}; it must be at least body_bytes={self.body_bytes}, or no such body is ever read"
            )


@configclass
class HttpConfig(Config):
    """A server.

    Attributes:
        host: address; the default is seen from this machine only.
        port: 0 takes a free one.
        name: what the model is called; None for the engine's name of it.
        names: what else it is called. A request may use any, and its answer names the one that it used.
        api_keys: ``name=secret`` or ``name=sha256:HEX`` (``printf %s SECRET | sha256sum``); none lets everybody in.
        admin_token: opens ``/v1/admin``; None closes it.
        cors_origins: origins whose pages may call, ``*`` for all; none by default.
        hosts: names beside those of this machine that a request may be for, ``*`` for all, where the server listens on this machine
            only: no web page may reach it by a name of its own.
        priority_keys: keys whose ``priority`` counts among all requests, ``*`` for all; that of others counts among their own alone.
        shared_prefixes: the prefix cache is one for all keys. One can then find out by asking what others have asked.
        reasoning_format: how the model's reasoning is told apart from its answers; ``auto`` by its chat template, ``none`` leaves it in.
        tool_format: how it writes calls of tools; ``auto`` by its chat template.
        strict: fields nobody knows are refused, not ignored with a warning header.
        admission: how many sequences may be under way and wait (a request of n choices is n); more are refused at once.
        limits: see `Limits`.
        drain_s: seconds that requests under way have to end after a signal to stop.
        keep_alive_s: a comment is sent when a stream has been silent for so long.
        restarts: how often a crashed engine is started again before the process gives up.
        restart_reset_s: an engine that has run for so long counts as well again.
        access_log: one line of JSON for each request on stderr.
        log_prompts: with the text of prompts, which are private otherwise.
        page: serve the chat page at ``/``.
        adapter_root: folder below which ``POST /v1/adapters`` may load adapters; None lets it load none.
    """

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    name: str | None = Field(default=None, min_length=1, max_length=256)
    names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    admin_token: str | None = Field(default=None, min_length=8)
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    priority_keys: tuple[str, ...] = ()
    shared_prefixes: bool = False
    reasoning_format: ReasoningFormat = "auto"
    tool_format: ToolFormat = "auto"
    strict: bool = False
    admission: AdmissionConfig = AdmissionConfig()
    limits: Limits = Limits()
    drain_s: float = Field(default=30.0, ge=0)
    keep_alive_s: float = Field(default=15.0, gt=0)
    restarts: int = Field(default=3, ge=0)
    restart_reset_s: float = Field(default=600.0, gt=0)
    access_log: bool = True
    log_prompts: bool = False
    page: bool = True
    adapter_root: str | None = Field(default=None, min_length=1)

    def __post_init__(self) -> None:
        check_names("hosts", self.hosts)
        for place, name in enumerate(self.names):
            if not isinstance(name, str) or not 0 < len(name) <= 256:
                raise ConfigError(f"names.{place} is {shown(name)}; a name has 1 to 256 characters")
        for place, entry in enumerate(self.api_keys):
            # What was given may be a secret, so it is not shown.
            if not all(entry.partition("=")[::2]):
                raise ConfigError(f"api_keys.{place} is not of the form name=secret or name=sha256:HEX")
        names = [entry.partition("=")[0] for entry in self.api_keys]
        if len(set(names)) < len(names):
            raise ConfigError("api_keys has a name twice; each key needs its own")
        unknown = [name for name in self.priority_keys if name != "*" and name not in names]
        if unknown:
            known = ", ".join(names) or "there are none"
            raise ConfigError(f"priority_keys has {unknown[0]!r}, which no key is called ({known}); '*' is for all")
