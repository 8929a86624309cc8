"""`GliderConfig`: how a pool chooses among its experts."""

from anabranch.adapters.glider.score import GliderScore, Local
from anabranch.bounds import Size
from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError
from anabranch.routing import HybridEntropy, Router, Select, TopK

__all__ = ["GliderConfig"]


@configclass
class GliderConfig(Config):
    """How experts are chosen.

    Attributes:
        local: by token: gates (``phatgoose``; an expert without one gets its Arrow prototype), ``arrow`` prototypes alone, or ``none``.
        instruction: whether the query as a whole counts.
        top_k: experts of a token; None for 2, or 1 where there is one.
        top_p: in place of ``top_k``: as few as hold so much of the softmax.
        weight: a, what cosines are multiplied by; None for ``gamma + beta`` where the best cosine is at least the threshold, and ``beta``
            elsewhere.
        gamma, beta: see ``weight``.
        threshold: p; None for what `GliderPool.calibrate` finds.
        temperature: of ``arrow``; the reference's is 10, peft's 1.
        clusters: G, of experts whose vectors are alike (see `clusters_of`): a token chooses a cluster, and its experts among the members of
            that, fewer than ``top_k`` where it has no more. None for one choice among all.
    """

    local: Local = "phatgoose"
    instruction: bool = True
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    weight: float | None = Field(default=None, ge=0)
    gamma: float = Field(default=100.0, ge=0)
    beta: float = Field(default=3.0, ge=0)
    threshold: float | None = Field(default=None, ge=-1, le=1)
    temperature: float = Field(default=1.0, gt=0)
    clusters: Size | None = Field(default=None, ge=1)

    def __post_init__(self) -> None:
        if self.clusters is not None and self.local == "none":
            raise ConfigError(
                f"clusters is {self.clusters}, and local 'none' gives tokens no vectors to choose one by; use 'phatgoose' or 'arrow'"
            )
        if self.top_k is not None and self.top_p is not None:
            raise ConfigError(f"top_k is {self.top_k} and top_p is {self.top_p}; give one of them")

    def router(self, num_experts: int) -> Router.Config:
        """For each matrix. Raises ConfigError for ``top_k``, or ``clusters``, above the number of experts."""
        select: Select.Config
        if self.top_p is not None:
            select = HybridEntropy.Config(
                top_p=self.top_p, keep_top_k=1, entropy_threshold=1.0, nucleus="inclusive", normalize="sum"
            )
        else:
            select = TopK.Config(top_k=min(2, num_experts) if self.top_k is None else self.top_k, normalize="sum")
        if self.clusters is not None and self.clusters > num_experts:
            raise ConfigError(f"clusters is {self.clusters}; of {num_experts} experts there are 1 to {num_experts}")
        score = GliderScore.Config(local=self.local, temperature=self.temperature, clusters=self.clusters)
        router = Router.Config(score=score, select=select, balance=())
        router.check(num_experts)
        return router
