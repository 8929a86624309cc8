"""`Form`: how one kind of attention is run with routed heads; and which kinds there are."""
# Shapes: B sequences, L queries, H heads, W width

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.nn.some_heads import SomeHeads

if TYPE_CHECKING:
    from anabranch.heads.routed_heads import RoutedHeads

__all__ = ["Decision", "Form", "Shape", "form_of"]


@dataclass(frozen=True, eq=False)
class Decision:
    """What was decided for the queries of one call.

    Attributes:
        scale_BLH: what each head's output is multiplied by.
        some: the heads that have to be computed, where that is few enough to make a difference; None for all.
    """

    scale_BLH: Tensor
    some: SomeHeads | None = None

    def scaled(self, y_BLHD: Tensor) -> Tensor:
        """y with each head scaled."""
        return y_BLHD * self.scale_BLH.unsqueeze(-1).to(y_BLHD.dtype)


@dataclass(frozen=True)
class Shape:
    """Attributes: ``num_heads``; ``width``, of what queries are made of; ``layer``, its number in a model, 0 where it has none."""

    num_heads: int
    width: int
    layer: int = 0


class Form:
    """One kind of attention. It has no state: the attention is ``heads.attention``."""

    def shape(self, attention: nn.Module) -> Shape:
        """Of an attention of this kind. Raises ConfigError for one that cannot be routed."""
        raise NotImplementedError  # abstract

    def prepare(self, attention: nn.Module) -> None:
        """Change what has to be changed in it; `restore` undoes it."""

    def restore(self, attention: nn.Module) -> None:
        """Leave it as it was before `prepare`."""

    def run(self, heads: "RoutedHeads", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the attention returns, with its heads scaled."""
        raise NotImplementedError  # abstract


def form_of(attention: Any) -> Form:
    """The form of an attention. Raises ConfigError where there is none, which says what there is."""
    from anabranch.heads.multihead import MultiheadForm
    from anabranch.heads.own import OwnForm
    from anabranch.heads.transformers_form import TransformersForm, is_transformers

    if isinstance(attention, nn.MultiheadAttention):
        return MultiheadForm()
    if isinstance(attention, nn.Module) and callable(getattr(attention, "per_head", None)):
        return OwnForm()
    if isinstance(attention, nn.Module) and is_transformers(attention):
        return TransformersForm()
    raise ConfigError(
        f"a {type(attention).__name__} has no heads that can be routed; use an attention of anabranch.nn, torch.nn.MultiheadAttention, an "
        "attention of transformers, or a module with num_heads, per_head and out"
    )


def argument(name: str, place: int, args: tuple[Any, ...], kwargs: dict[str, Any], default: Any = None) -> Any:
    """An argument of a call, however it was given."""
    return args[place] if place < len(args) else kwargs.get(name, default)
