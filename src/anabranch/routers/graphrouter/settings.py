"""Settings of GraphRouter. Nothing here needs torch."""

from anabranch.config import Config, Field, configclass


@configclass
class Training(Config):
    """How the modes of the paper are trained. Defaults are the reference code's.

    Attributes:
        steps: of the optimiser.
        draws: masks per step.
        mask_rate: share of edges that are predicted, in a draw.
        lr: of AdamW.
        weight_decay: of AdamW.
        check_every: steps between looks at the validation queries.
    """

    steps: int = Field(default=1000, ge=0)
    draws: int = Field(default=32, ge=1)
    mask_rate: float = Field(default=0.5, gt=0, lt=1)
    lr: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    check_every: int = Field(default=10, ge=1)


@configclass
class Episodes(Config):
    """How ``plus`` is trained.

    Attributes:
        steps: of the optimiser.
        lr: of sharpness, weights and caution.
        fine_lr: of what has many numbers: centres, attention, descriptions.
        weight_decay: of those.
        hidden: share of queries hidden in an episode.
        least_rate: smallest share of a model's edges that is visible, drawn log-uniform up to 1 for half of the models.
        virtual: chance that a model is a virtual one, in half of the episodes.
        no_description: chance that a model has no description.
        most_queries: queries in an episode.
        check_every: steps between looks at the validation queries.
    """

    steps: int = Field(default=100, ge=0)
    lr: float = Field(default=0.01, gt=0)
    fine_lr: float = Field(default=0.00005, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    hidden: float = Field(default=0.5, gt=0, lt=1)
    least_rate: float = Field(default=0.005, gt=0, le=1)
    virtual: float = Field(default=0.5, ge=0, le=1)
    no_description: float = Field(default=0.2, ge=0, le=1)
    most_queries: int = Field(default=8192, ge=2)
    check_every: int = Field(default=25, ge=1)


@configclass
class PlusConfig(Config):
    """What mode ``plus`` is made of.

    Attributes:
        centres: K of the bank of learned centres.
        neighbours: J, nearest queries that are attended to, of those fitted and of those observed since.
        width: of learned attention and of the description term.
        safety: a model that joined later counts for its expected effect less so many standard errors; 0 takes it at its word.
        explore: every model counts for so many standard errors more; above 0 for routers that learn from their own choices alone.
        exact_below: rows from which on neighbours are found by HNSW.
        capacity: most observed queries that are stored; then the oldest make room. Those fitted stay.
        episodes: training.
    """

    centres: int = Field(default=64, ge=1)
    neighbours: int = Field(default=40, ge=1)
    width: int = Field(default=16, ge=1)
    safety: float = Field(default=2.0, ge=0)
    explore: float = Field(default=0.0, ge=0)
    exact_below: int = Field(default=2000, ge=1)
    capacity: int = Field(default=200_000, ge=1)
    episodes: Episodes = Episodes()
