"""The seam every upstream fits."""

from typing import Any

from anabranch.config import Config as BaseConfig
from anabranch.config import Part, configclass


class Provider(Part, family="provider"):
    """Interface."""

    @configclass
    class Config(BaseConfig):
        """What all have.

        Attributes:
            model: what the upstream calls the model.
        """

        model: str = ""

    def __init__(self, config: Any) -> None:
        self.config = config
