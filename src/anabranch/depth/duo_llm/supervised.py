"""Stage 3 with labels: routers learn the routes that an oracle chose, as a task of the trainer.

    L = focal(W_l h / tau, label_l)       with the labelled route executed, so that each router sees the states its label leads to

Supervision by labels is ours; the paper's stage 3 knows none.
"""
# Shapes: B sequences, L positions, Y duo layers, E options

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anabranch.config import configclass
from anabranch.depth.duo_llm.labels import RouteLabels
from anabranch.depth.duo_llm.layer import duo_layers, take
from anabranch.depth.duo_llm.parts import class_weights
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
        config: says the model.
        model: a duo model with a learned router, see `with_router`.
        labels: what it learns from.
    """

    headline: ClassVar[str] = "agreement"
    unit: ClassVar[str] = "tokens"
    material: ClassVar[str] = "labels"

    @configclass
    class Config(Task.Config):
        """Attributes: ``model``, the duo model with its learned router."""

        model: Decoder.Config

    def __init__(self, config: Config, *, labels: RouteLabels, model: Decoder | None = None) -> None:
        super().__init__(config, model=model)
        self.labels = labels
        layer: Any = config.model.feed_forward
        num_options = layer.num_options
        self._weight_E = class_weights(labels.route_BLY, num_options)

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


def chosen_routes(model: Decoder, token_BL: Tensor) -> Tensor:
    """route_BLY: the option that the model takes for each token in each duo layer, in its present mode."""
    with record_routing(model) as recorder:
        model(token_BL)
    trace = recorder.trace()
    columns = [torch.from_numpy(trace.decisions(layer.layer).index_NK).view(token_BL.shape) for layer in trace.layers]
    assert len(columns) == len(duo_layers(model))
    return torch.stack(columns, dim=-1).long().to(token_BL.device)
