"""AdapterFusion as a method of `anabranch adapt`: adapters that were trained one by one, and what learns to choose among them.

anabranch adapt SmolLM2-135M law.jsonl --method adapter-pfeiffer --out law
anabranch adapt SmolLM2-135M sql.jsonl --method adapter-pfeiffer --out sql
anabranch adapt SmolLM2-135M rows.jsonl --method adapter-fusion --set method.adapters='["law/adapter", "sql/adapter"]' --out both
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from anabranch.adapters.adapt.method import Method
from anabranch.adapters.after import SerialBottleneck
from anabranch.adapters.around import bare_config
from anabranch.adapters.fusion import AdapterFusion
from anabranch.adapters.graft import layers_of, patterns_of
from anabranch.adapters.names import projections_of
from anabranch.adapters.own_folder import described_in, read_own
from anabranch.adapters.put_on import put_on, take_off
from anabranch.config import Field, Size, configclass
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn.linear import Linear

__all__ = ["FusionMethod"]

# Of one adapter, by the part behind which it is: its config, and its numbers by name.
_Found = Mapping[str, tuple[SerialBottleneck.Config, dict[str, Tensor]]]


class FusionMethod(Method, kind="adapter-fusion"):
    """Attention over adapters, given or new (arXiv 2005.00247)."""

    summary: ClassVar[str] = "attention over the outputs of several bottleneck adapters, given or new"
    folders: ClassVar[tuple[str, ...]] = ("adapters",)

    @configclass
    class Config(Method.Config):
        """Who the adapters are.

        Attributes:
            adapters: folders of our own form with bottlenecks in series (``adapter-pfeiffer``, ``adapter-houlsby``), which stay as they
                are: the attention alone learns, behind the matrices that they are behind (``targets`` do not matter). None for new ones,
                which learn with it.
            number, width, activation: of new ones.
            value_penalty: see `AdapterFusion.Config`.
        """

        targets: tuple[str, ...] = Field(default=("down",), min_length=1)
        adapters: tuple[str, ...] | None = None
        number: Size = Field(default=4, ge=1)
        width: Size = Field(default=64, ge=1)
        activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
        value_penalty: float = Field(default=0.01, ge=0)

        def __post_init__(self) -> None:
            if self.adapters is not None and not self.adapters:
                raise ConfigError("adapters is empty; name at least one folder, or leave it out for new adapters")

    config: Config

    def layer(self, tasks: Sequence[str]) -> AdapterFusion.Config:
        """New adapters."""
        config = self.config
        return AdapterFusion.Config(
            widths=(config.width,) * config.number,
            activation=config.activation,
            value_penalty=config.value_penalty,
        )

    def begin(self, model: Decoder, tasks: Sequence[str], *, seed: int) -> Decoder:
        """New adapters, or those that are given, frozen.

        Raises as `read_own`; ConfigError for folders of other adapters than bottlenecks in series, and for some that are behind other
        matrices than the first, or have another activation.
        """
        if self.config.adapters is None:
            return super().begin(model, tasks, seed=seed)
        found = [_read(folder, model) for folder in self.config.adapters]
        self._check(found)
        configs: dict[str, Linear.Config] = {
            part: AdapterFusion.Config(
                widths=tuple(one[part][0].width for one in found),
                activation=config.activation,
                value_penalty=self.config.value_penalty,
            )
            for part, (config, _) in found[0].items()
        }
        parts = [one.name for one in projections_of(bare_config(model.config))]
        put_on(model, patterns_of(configs, parts), seed=seed)
        for part, layer in layers_of(model).items():
            for number, one in enumerate(found):
                numbers = one[part][1]
                layer.take(number, *(numbers[name] for name in ("down", "down_bias", "up", "up_bias")))
            layer.freeze_adapters()
        return model

    def go_on(self, model: Decoder, tasks: Sequence[str], layers: Mapping[str, Linear.Config], *, seed: int) -> Decoder:
        """The layers alone: numbers of adapters that were given are in the checkpoint."""
        put_on(model, layers, seed=seed)
        if self.config.adapters is not None:
            for layer in layers_of(model).values():
                layer.freeze_adapters()
        return model

    def _check(self, found: Sequence[_Found]) -> None:
        assert self.config.adapters is not None
        folders = self.config.adapters
        for folder, one in zip(folders[1:], found[1:], strict=True):
            odd = sorted(one.keys() ^ found[0].keys())
            if odd:
                raise ConfigError(
                    f"{folder} and {folders[0]} are not behind the same matrices: one of them has {odd[0]} alone; train them with the "
                    "same targets"
                )
            for part, (config, _) in one.items():
                if config.activation != found[0][part][0].activation:
                    raise ConfigError(
                        f"{folder} has activation {config.activation!r} and {folders[0]} {found[0][part][0].activation!r}; adapters that "
                        "are fused have one"
                    )


def _read(folder: str, model: Decoder) -> _Found:
    """The bottlenecks in ``folder``, which is put onto the model and taken off again."""
    kinds = described_in(folder)["kinds"]
    if kinds != ["serial_bottleneck"]:
        raise ConfigError(
            f"{folder} is {', '.join(kinds)}, and what is fused are bottlenecks in series (adapter-pfeiffer, adapter-houlsby)"
        )
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    read_own(folder, model)
    try:
        return {
            part: (layer.config, {name: value.detach().clone() for name, value in layer.named_parameters()})
            for part, layer in layers_of(model).items()
        }
    finally:
        take_off(model)
        for parameter in learned:
            parameter.requires_grad_(True)
