"""Stage 3 with labels: routers learn the routes that an oracle chose, as a task of the trainer.

    L = focal(W_l h / tau, label_l)       with the labelled route executed, so that each router sees the states its label leads to

Supervision by labels is ours; the paper's stage 3 knows none. ``anabranch train duo --from MODEL --labels FILE`` is such a run.
"""
# Shapes: B sequences, L positions, Y duo layers, E options

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anabranch.config import configclass
from anabranch.data import Tokenizer
from anabranch.depth.duo_llm.labels import RouteLabels
from anabranch.depth.duo_llm.layer import DuoFFN, duo_layers, take
from anabranch.depth.duo_llm.parts import class_weights
from anabranch.errors import ConfigError, DataError
from anabranch.lm.decoder import Decoder
from anabranch.routing import record_routing
from anabranch.train import DecoderTask, Examples, Losses, Task, TaskContext

__all__ = ["LabelledRoutes"]

# In the names of parameters.
ROUTERS = ".router."


class LabelledRoutes(DecoderTask, kind="labelled_routes"):
    """Routers of a frozen duo model learn the routes of ``labels`` by focal loss, with class weights of the labels.

    Measured by ``agreement``: how often, over layers and tokens, a router takes what its label says.

    Args:
        config: says the model, and where labels lie that are not given.
        model: a duo model with a learned router, see `with_router`.
        labels: what it learns from. Default: those of the file that ``config`` names.
        tokenizer: of the model, saved beside it; None for none.

    Raises ConfigError without labels, DataError for a file that holds none, or labels of another model: of other layers or options, with
    tokens that it has not, or longer than it reads.
    """

    headline: ClassVar[str] = "agreement"
    better: ClassVar[Literal["lower", "higher"] | None] = "higher"
    unit: ClassVar[str] = "tokens"
    material: ClassVar[str] = "labels"

    @configclass
    class Config(Task.Config):
        """What learns, and from what.

        Attributes:
            model: the duo model with its learned router.
            labels: a file of `RouteLabels`; None where they are given.
            source: the model that it began as, before its routers were made; for whoever goes on with the run.
        """

        model: Decoder.Config
        labels: str | None = None
        source: str | None = None

    def __init__(
        self,
        config: Config,
        *,
        labels: RouteLabels | None = None,
        model: Decoder | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(config, model=model)
        if labels is None:
            if config.labels is None:
                raise ConfigError(
                    "LabelledRoutes has no labels; give it labels=RouteLabels(...), or a file in config.labels"
                )
            labels = RouteLabels.read(config.labels)
        _check(labels, config.model, config.labels or "labels")
        self.labels, self.tokenizer = labels, tokenizer
        layer: Any = config.model.feed_forward
        self._weight_E = class_weights(labels.route_BLY, layer.num_options)

    def learns(self, name: str, parameter: nn.Parameter) -> bool:
        """Routers alone."""
        return ROUTERS in name

    def training_data(self, context: TaskContext) -> Examples:
        """Labelled sequences, each once an epoch."""
        labels = self.labels
        place = {"rank": context.rank, "world_size": context.world_size}
        return Examples(labels.ids_BL, labels.route_BLY, seed=context.settings.seed, **place)

    def validation_data(self, context: TaskContext) -> tuple[Tensor, Tensor]:
        """The same sequences: what is asked is whether a router can say what the labels say."""
        return self.labels.ids_BL, self.labels.route_BLY

    def units_per_item(self, context: TaskContext) -> int:
        """Tokens of a sequence that have a label."""
        return self.labels.route_BLY.shape[1]

    def step(self, model: nn.Module, batch: tuple[Tensor, Tensor], context: TaskContext) -> Losses:
        """Focal loss. The frozen base gives no gradient, and the given route none to routers, so it is all that acts."""
        ids_BL, route_BLY = batch
        weight_E = self._weight_E.to(ids_BL.device)
        output = model(ids_BL[:, :-1], ids_BL[:, 1:], state=take(route_BLY, supervision=weight_E))
        auxiliary = dict(output.auxiliary)
        terms = {"focal": auxiliary.pop("focal"), "cross_entropy": output.cross_entropy, **auxiliary}
        return Losses(output.loss, terms, output.metrics)

    def evaluate(self, model: Any, data: tuple[Tensor, Tensor], context: TaskContext) -> dict[str, float]:
        """The agreement, a share."""
        ids_BL, route_BLY = data
        agreed = 0
        for ids, route in zip(ids_BL.split(context.batch_size), route_BLY.split(context.batch_size), strict=True):
            agreed += int((chosen_routes(model, ids[:, :-1]) == route).sum())
        return {"agreement": agreed / max(route_BLY.numel(), 1)}


def _check(labels: RouteLabels, model: Decoder.Config, what: str) -> None:
    """Raise DataError for labels that are not of this model, ConfigError for a model without duo layers."""
    layer = model.feed_forward
    if not isinstance(layer, DuoFFN.Config):
        raise ConfigError(f"routes are of duo models, and this one's feed_forward is {layer.owner.kind!r}")
    _, length, num_layers = labels.route_BLY.shape
    ours = sum(isinstance(model.feed_forward_of(number), DuoFFN.Config) for number in range(model.num_layers))
    if num_layers != ours:
        raise DataError(f"{what} has routes over {num_layers} duo layers, and the model has {ours}")
    if length > model.max_positions:
        raise DataError(f"{what} has sequences of {length} tokens, and the model reads {model.max_positions}")
    # That there are none, the stream of examples says.
    for name, value, limit in (
        ("option", labels.route_BLY, layer.num_options),
        ("token", labels.ids_BL, model.vocab_size),
    ):
        if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < limit:
            wrong = int(value.max()) if int(value.max()) >= limit else int(value.min())
            raise DataError(f"{what} has {name} {wrong}, and the model has 0 to {limit - 1}")


def chosen_routes(model: Decoder, token_BL: Tensor) -> Tensor:
    """route_BLY: the option that the model takes for each token in each duo layer, in its present mode."""
    with record_routing(model) as recorder:
        model(token_BL)
    trace = recorder.trace()
    columns = [torch.from_numpy(trace.decisions(layer.layer).index_NK).view(token_BL.shape) for layer in trace.layers]
    assert len(columns) == len(duo_layers(model))
    return torch.stack(columns, dim=-1).long().to(token_BL.device)
