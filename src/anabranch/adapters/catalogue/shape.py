"""`Shape`: what costs of an adapter depend on, of a model that need not be there: its matrices, norms, biases and widths."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from anabranch.adapters.names import projections_of
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty, some

__all__ = ["ATTENTION", "MLP", "Matrix", "Shape"]

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
# What transformers calls them, of most families.
_THEIRS = {f"{word}_proj": word for word in (*ATTENTION, *MLP)} | {"lm_head": "head"}
_GROUPS = {"attention": "*.attention.*", "mlp": "*.feed_forward.*"}


@dataclass(frozen=True)
class Matrix:
    """One linear layer.

    Attributes:
        part: its name, ``blocks.3.attention.q``.
        in_dim, out_dim: its sizes.
        share: of the tokens, how many go through it; less than 1 for an expert.
    """

    part: str
    in_dim: int
    out_dim: int
    share: float = 1.0

    @property
    def layer(self) -> int | None:
        """Of the block that it is in; None for the head."""
        words = self.part.split(".")
        return int(words[1]) if words[0] == "blocks" else None

    @property
    def word(self) -> str:
        """The last word of its name."""
        return self.part.rpartition(".")[2]

    @property
    def size(self) -> int:
        """Its weights."""
        return self.in_dim * self.out_dim


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        config: of the model.
        matrices: its linear layers, block by block.
        parameters: all of them.
        norms: weights of all norms.
        biases: numbers of all biases.
        kv_width: numbers of the keys of one position in one layer, of all heads.
        query_width: of its queries.
    """

    config: Decoder.Config
    matrices: tuple[Matrix, ...]
    parameters: int
    norms: int
    biases: int
    kv_width: int
    query_width: int

    @classmethod
    def of(cls, config: Decoder.Config) -> "Shape":
        """The sizes of a model of this config. Nothing of it is built that takes memory."""
        config = config.replace(linears={})
        named = dict(build_empty(config).named_parameters())
        attention = config.attention
        width = attention.kept(config.dim)[0]
        heads = getattr(attention, "num_heads", attention.kv_heads)
        return cls(
            config=config,
            matrices=tuple(
                Matrix(one.name, one.in_dim, one.out_dim, _share(config, one.name)) for one in projections_of(config)
            ),
            parameters=sum(parameter.numel() for parameter in named.values()),
            norms=sum(one.numel() for name, one in named.items() if is_norm(name)),
            biases=sum(one.numel() for name, one in named.items() if is_bias(name)),
            kv_width=attention.kv_heads * width,
            query_width=heads * width,
        )

    @property
    def dim(self) -> int:
        """Width of the model."""
        return self.config.dim

    @property
    def num_layers(self) -> int:
        """Blocks."""
        return self.config.num_layers

    def chosen(self, targets: Sequence[str]) -> list[Matrix]:
        """The matrices that ``targets`` name.

        Args:
            targets: last words of names, ours (``q``) or those of most families of transformers (``q_proj``); ``attention``, ``mlp`` or
                ``all`` (every linear layer but the head); or patterns of whole names (``blocks.0.*``).

        Raises ConfigError for one that names no matrix, with the nearest that would.
        """
        found: dict[str, Matrix] = {}
        for target in targets:
            fitting = [matrix for matrix in self.matrices if _is_named(matrix, target)]
            if not fitting:
                words = sorted({matrix.word for matrix in self.matrices})
                known = [*words, *_GROUPS, "all"]
                near = difflib.get_close_matches(target, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(known)}, or a pattern of a whole name"
                raise ConfigError(f"targets has {target!r}, which names no linear layer of this model; {hint}")
            found |= {matrix.part: matrix for matrix in fitting}
        if not found:
            raise ConfigError(
                f"targets is empty; name linear layers, such as {some([one.word for one in self.matrices])}"
            )
        # In the order of the model, whatever the order of the targets.
        return [matrix for matrix in self.matrices if matrix.part in found]


def is_norm(name: str) -> bool:
    """Whether a parameter is a norm's weight."""
    return name.endswith("norm.weight") or ".norm." in name


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias."""
    return name.endswith("bias")


def is_of_attention(name: str) -> bool:
    """Whether a parameter is a matrix of attention."""
    return ".attention." in name and name.endswith("weight") and not is_norm(name)


def _is_named(matrix: Matrix, target: str) -> bool:
    if target == "all":
        return matrix.layer is not None
    pattern = _GROUPS.get(target, target if "." in target or "*" in target else None)
    if pattern is not None:
        return fnmatchcase(matrix.part, pattern)
    return matrix.word == _THEIRS.get(target, target)


def _share(config: Decoder.Config, part: str) -> float:
    words = part.split(".")
    if "experts" not in words or words[0] != "blocks":
        return 1.0
    experts = config.feed_forward_of(int(words[1]))
    choices, number = getattr(experts, "num_choices", None), getattr(experts, "num_experts", None)
    return min(1.0, choices / number) if choices and number else 1.0
