"""Models in the config, and where they run."""

from typing import Literal

from anabranch.config import Config, Field, configclass
from anabranch.gateway.output_speeds import MOST_SPEED
from anabranch.gateway.providers.provider import Provider
from anabranch.routers.money import Price

Balance = Literal["weighted", "least_in_flight", "latency", "tpm", "price"]


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
        idle_timeout_s: seconds between two signs of life of a stream (events, pings, comments); None takes the model's, then
            ``timeout_s``.
        rpm: requests a minute it takes; None is no limit.
        tpm: tokens a minute it takes; None is no limit.
        max_in_flight: requests at a time; None is no limit. A key may have ``limits.key_share`` of those that others leave.
        output_speed: tokens a second of one answer, at most, of its fastest tier, thoughts among them. What was not seen of a stream that
            is left is charged by it; None takes the model's, and where that is None too, ``lost.output_speed``.
        thinks: its model may think what it does not show, unasked; false: it never does; None takes the model's.
        stops_when_closed: its provider stops making a stream, and billing it, once the connection is closed; where it does not, a stream
            that is left is read on to its end, or charged its worst case. None takes what is known of the kind and the address.
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
    output_speed: float | None = Field(default=None, gt=0, le=MOST_SPEED)
    thinks: bool | None = None
    stops_when_closed: bool | None = None
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
        output_speed, thinks: likewise. Where ``thinks`` is None, what the upstream calls the model tells; one of which that does not say
            that it shows all that it makes may think unseen.
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
    output_speed: float | None = Field(default=None, gt=0, le=MOST_SPEED)
    thinks: bool | None = None
    deployments: tuple[DeploymentConfig, ...] = Field(min_length=1)

    def deployment_name(self, at: int) -> str:
        """Of the deployment in place ``at``."""
        return self.deployments[at].name or (self.name if len(self.deployments) == 1 else f"{self.name}#{at}")
