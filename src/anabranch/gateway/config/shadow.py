"""Shadow samples in the config: what share of live traffic other models are asked too, and for how much."""

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError


@configclass
class ShadowConfig(Config):
    """A share of the questions that users ask is asked of the other models too, in the background, and the answers are judged.

    Attributes:
        judge: model that says what answers are worth, each against that of the first of ``models``, once in each order.
        models: to be compared, by name; empty for all of the config.
        share: of the questions; of those alike, all or none.
        budget_usd: dollars a day for all of it, the judge's calls too; the budget of the tag ``shadow``.
        rate: calls a minute, the judge's among them.
        conversations: routers learn from questions with a system prompt, earlier turns or a name too, under their last text, as a strategy
            sees them when it decides. Who asks has a say in what every model answers then: for gateways whose keys are your own apps'.
            Otherwise such outcomes are kept and left out, those too that an earlier config let be learned from, once a gateway serves
            with this one.
    """

    judge: str = Field(min_length=1)
    models: tuple[str, ...] = ()
    share: float = Field(default=0.05, gt=0, le=1)
    budget_usd: float = Field(default=1.0, ge=0, le=1e6)
    rate: float = Field(default=60.0, gt=0, le=1e6)
    conversations: bool = False

    def __post_init__(self) -> None:
        if self.models and len(set(self.models)) < max(2, len(self.models)):
            raise ConfigError(
                f"models are {', '.join(self.models)}; name at least two, each once, or leave it out to compare all"
            )
