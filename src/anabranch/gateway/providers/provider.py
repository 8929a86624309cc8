"""The seam every upstream fits: a `Provider` says what to send and how to read what comes back; a `Transport` carries it.

    build       request -> HttpCall              what to send
    parse       body -> Answer                   a whole answer, in OpenAI's form
    translator  None, or what turns a foreign stream into OpenAI's chunks
    error       status, headers, body -> Failure what went wrong, in one vocabulary

All four are pure. Providers that need no socket (mock, replay, local) or that look on (record) put a transport of their own in the place of
HTTP. One that holds something (local: a model) gets it in `start` and gives it back in `close`.

A provider is written with what is imported here: what it is given (`upstream_request`), what it sends (`http_call`), what it makes of that
(`answer`), and what may go wrong (`failures`, `error_body`).
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, ClassVar, Protocol

from anabranch.config import Config as BaseConfig
from anabranch.config import Part, configclass
from anabranch.gateway.providers.answer import Answer as Answer
from anabranch.gateway.providers.answer import answer_bytes as answer_bytes
from anabranch.gateway.providers.answer import estimated as estimated
from anabranch.gateway.providers.answer import parse_object as parse_object
from anabranch.gateway.providers.error_body import classify as classify
from anabranch.gateway.providers.error_body import hidden as hidden
from anabranch.gateway.providers.error_body import retry_after as retry_after
from anabranch.gateway.providers.failures import Failure as Failure
from anabranch.gateway.providers.failures import FailureKind as FailureKind
from anabranch.gateway.providers.failures import UpstreamError as UpstreamError
from anabranch.gateway.providers.failures import excess as excess
from anabranch.gateway.providers.failures import garbage as garbage
from anabranch.gateway.providers.http_call import BODY_BYTES as BODY_BYTES
from anabranch.gateway.providers.http_call import Headers as Headers
from anabranch.gateway.providers.http_call import HttpCall as HttpCall
from anabranch.gateway.providers.http_call import Reply as Reply
from anabranch.gateway.providers.http_call import Transport as Transport
from anabranch.gateway.providers.http_call import read_all as read_all
from anabranch.gateway.providers.http_call import read_beginning as read_beginning
from anabranch.gateway.providers.http_call import read_error as read_error
from anabranch.gateway.providers.upstream_request import WRITES as WRITES
from anabranch.gateway.providers.upstream_request import Endpoint as Endpoint
from anabranch.gateway.providers.upstream_request import Json as Json
from anabranch.gateway.providers.upstream_request import Native as Native
from anabranch.gateway.providers.upstream_request import UpstreamRequest as UpstreamRequest
from anabranch.gateway.providers.usage import Usage as Usage
from anabranch.gateway.providers.vocabulary import status_said


class Translator(Protocol):
    """Turns one foreign stream into OpenAI's chunks.

    Of an upstream that speaks of usage before the end, it has ``told`` too: the `Usage` as said so far, or None.
    """

    def feed(self, data: bytes) -> Iterable[Json]:
        """The chunks of one event's data. Raises UpstreamError if it reports an error or cannot be read."""

    @property
    def is_done(self) -> bool:
        """The stream has said that it is over."""


class Provider(Part, family="provider"):
    """Interface: see the module."""

    @configclass
    class Config(BaseConfig):
        """What all have.

        Attributes:
            model: what the upstream calls the model.
        """

        model: str = ""

        def check(self, *, reads_model: bool = False) -> None:
            """Look whether what it names is there, as far as that is on this machine.

            Args:
                reads_model: look into the model's files too, which may take seconds.

            Raises AnabranchError: MissingExtraError, or one whose message begins with the field that is wrong.
            """

    endpoints: ClassVar[tuple[Endpoint, ...]] = ("chat", "completions", "embeddings")

    # Somebody may send an invoice for it: without a price, what it costs is not known.
    is_billed: ClassVar[bool] = True

    # It puts prompts into its cache without being asked to, and may bill that.
    caches_unasked: ClassVar[bool] = True

    # It takes a `prediction`, and bills what of it is not in its answer.
    predicts: bool = False

    # Of a chat each tool that searches or fetches at the upstream is held to its `max_tool_calls`.
    holds_tool_calls: bool = False

    # It makes an answer to its end, and may bill that, whoever has gone meanwhile.
    makes_on: ClassVar[bool] = True

    # It stops making a stream, and billing it, once the connection is closed. Of one of which nobody says so, that is not known.
    stops_when_closed: bool = False

    # It answers within this process, which holds what that takes.
    is_inside: ClassVar[bool] = False

    # Most prompt and completion tokens together, of one that knows it of itself; None where that is for the config to say. It counts once
    # the provider has started: until then it may be None, or a property that fails.
    context: int | None = None

    # Tokens of a text, of one that has the model's tokenizer; None where the config has to name it.
    counter: Callable[[str], int] | None = None

    # Prompt tokens of a call as its model reads them, of one that can say so before it is asked; None of a call where it would refuse that.
    prompt_tokens: Callable[[HttpCall], Awaitable[int | None]] | None = None

    # What it counts itself, as text for Prometheus; None where it counts nothing.
    series: Callable[[], bytes] | None = None

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def has_failed(self) -> bool:
        """What it has in this process was given up, and comes back with another config alone."""
        return False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.model!r})"

    def build(self, request: UpstreamRequest) -> HttpCall:
        """What to send. Raises UpstreamError (``unsupported``) if the provider cannot do this."""
        raise NotImplementedError

    def parse(self, request: UpstreamRequest, body: bytes) -> Answer:
        """The body of a 2xx answer. Raises UpstreamError (``garbage``)."""
        value = parse_object(body)
        # Some servers say 200 and mean it not.
        if isinstance(value.get("error"), dict):
            raise UpstreamError(self.error(status_said(value), {}, body))
        wanted = "data" if request.endpoint == "embeddings" else "choices"
        if not isinstance(value.get(wanted), list):
            raise garbage(f"an answer without {wanted!r}", body)
        usage = Usage.of(value)
        return Answer(value, body, usage if usage is not None and usage.prompt else estimated(request, value, usage))

    def translator(self, request: UpstreamRequest) -> Translator | None:
        """None if the stream is in OpenAI's form already and is passed on as it comes."""
        return None

    def error(self, status: int, headers: Headers, body: bytes) -> Failure:
        """What an answer that is not 2xx means."""
        return self.redacted(classify(status, headers, body))

    def redacted(self, failure: Failure) -> Failure:
        """The same with no key in what it says."""
        return hidden(failure, None)

    def transport(self, http: Transport) -> Transport:
        """What carries its calls: HTTP, unless it says otherwise.

        Of another than ``http`` all that is done for one call, from `Transport.open` to `Reply.close`, runs in one task and one context,
        which are not those of the request; only what has come (`Reply.read_ready`) and the head are looked at from there. The task is
        cancelled once where nobody waits for the call any more.
        """
        return http

    async def start(self) -> None:
        """Before its calls, in their event loop: get ready what takes long. Raises AnabranchError if that cannot be."""

    async def close(self) -> None:
        """After its last call, or where it was never started."""
