"""Our own engine behind HTTP (``anabranch serve``): OpenAI's API without a key, on this machine unless told otherwise."""

from anabranch.config import configclass
from anabranch.gateway.providers.openai import OpenAI


class Engine(OpenAI, kind="engine"):
    """Talks to a server of `anabranch.serving`, or any other that needs no key."""

    is_billed = False
    predicts = False
    # Its templates write several messages of one turn in their order.
    joins_turns = False

    @configclass
    class Config(OpenAI.Config):
        """As `OpenAI.Config`, with other defaults."""

        base_url: str = "http://127.0.0.1:8000/v1"
        key_env: str | None = None
