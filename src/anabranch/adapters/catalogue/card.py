"""`Card`: one method of parameter-efficient fine-tuning, as a machine and a person can read it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from anabranch.adapters.catalogue.shape import Matrix, Shape, is_bias, is_norm, is_of_attention
from anabranch.adapters.front import Front
from anabranch.adapters.ladder import Ladder
from anabranch.adapters.own_folder import OwnAdapter
from anabranch.nn import Linear

__all__ = ["Backend", "Card", "Layer", "Op", "Options", "Paper", "Trained", "Work"]

Options = Mapping[str, Any]
Backend = Literal["own", "peft", "none"]
# The config of what stands beside one matrix.
Layer = Callable[[Matrix, Shape, Options], Linear.Config]
# What methods train of a base: few of its numbers, matrices that are chosen, or everything.
Trained = Literal["biases", "norms", "attention", "matrices", "all"]
_IS_TRAINED: Mapping[Trained, Callable[[str], bool]] = {
    "biases": is_bias,
    "norms": is_norm,
    "attention": is_of_attention,
    "matrices": lambda name: not (is_bias(name) or is_norm(name)),
    "all": lambda name: True,
}


@dataclass(frozen=True)
class Paper:
    """Where a method comes from; ``arxiv`` is None where it is not there."""

    name: str
    year: int
    arxiv: str | None = None


@dataclass(frozen=True)
class Op:
    """A product of matrices that a method adds to one linear layer.

    Attributes:
        flops: of a token, forward.
        trains: whether its matrix learns, so that its gradient is computed.
        takes_x: whether it multiplies what comes into the layer, or what another product of the adapter gave.
        per_call: FLOPs of a forward pass, whatever the number of tokens: of building a matrix.
    """

    flops: float
    trains: bool = True
    takes_x: bool = True
    per_call: float = 0.0


@dataclass(frozen=True)
class Work:
    """What a method computes beside each adapted matrix.

    Attributes:
        told: per token, in words.
        ops: product by product.
        is_behind: whether it takes what comes out of the matrix, and not what goes into it.
        kept: numbers of a token that a training step keeps besides those that its products say, see `anabranch.adapters.catalogue.kept`.
    """

    told: str
    ops: Callable[[Matrix, Options], list[Op]]
    is_behind: Callable[[Matrix], bool] = lambda matrix: False
    kept: Callable[[Matrix, Options], float] = lambda matrix, options: 0.0


@dataclass(frozen=True)
class Card:
    """What is known of one method.

    Attributes:
        id: the name that commands know it by.
        name: as its paper writes it.
        family: ``additive/prompt``, ``selective``, ``reparameterised/low-rank``, ...
        rule: what it computes, or what it trains.
        where: where it sits in a model.
        formula: trainable parameters, in words of ``symbols``.
        papers: where it comes from.
        backend: ``own`` code, through ``peft``, or ``none``: neither puts it onto a model by its id, see ``setting`` and ``way``.
        peft_type: of the package peft, where it has the method.
        options: what may be set, with usual values.
        least: of options that are whole numbers, the least value where that is not 1.
        takes: whether a matrix that was chosen gets anything; None where all do.
        count: trainable parameters, of chosen matrices of a model; None where they depend on what the card cannot know.
        frozen: numbers of 4 bytes that are kept and stored besides those that learn; None for none.
        work: what it adds to a matrix; None where nobody has counted that.
        layer: what stands beside each matrix that was chosen; None where that is no layer of ours.
        front: the virtual tokens of ours that stand in front of a model; None for none.
        ladder: the network of ours that stands along it; None for none.
        learns: of the parameters of layer, front and ladder, whether one learns, by its name.
        trained: the parameters of the base that learn; None where they stay as they are.
        added_tokens: tokens that it puts in front of every sequence.
        prefix_positions: positions that every layer's attention sees besides.
        along: of a network that stands along the whole model, per token: (FLOPs forward, those of what the model's hidden states go
            through, behind which nothing learns, numbers that a training step keeps). No gradient goes through the model then, but through
            its head.
        starts_as_base: whether a new adapter leaves the model's outputs as they were.
        merges: whether a trained adapter can become part of the matrices.
        mixed: how rows of a batch have adapters of their own: in our pool (`load_pool`) and in a server, in a server alone, or not.
        looks: what it makes, before the first step, of -log p(answer) of each of the first rows; None for nothing, see `Method.look`.
        speed: how many times as quickly as usual a parameter learns, by its name.
        written: what becomes of a trained adapter in our own form when it is written; None where it stays as it is.
        not_by_rows: why rows alone do not train it, and what would; empty where they do.
        parts_differ: why a batch in parts teaches something else than at once, see `Method.parts_differ`.
        memory: what it saves or costs in memory besides the bytes of its parameters.
        limits: what it cannot do, or where it fails.
        needs_bias: whether the model must have biases.
        setting: of training, with any method, where it is that and no adapter: ``train.optimizer=mezo``.
        only_peft: why it is not put onto a model of ours, where peft runs it on one of transformers; None where it is.
        way: what runs it, where nothing puts it on by its id and something else of Anabranch does: a command, or a call in Python.
    """

    id: str
    name: str
    family: str
    rule: str
    where: str
    formula: str
    papers: tuple[Paper, ...]
    backend: Backend = "none"
    peft_type: str | None = None
    options: Options = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)
    count: Callable[[Sequence[Matrix], Shape, Options], int] | None = None
    takes: Callable[[Matrix, Shape, Options], bool] | None = None
    frozen: Callable[[Sequence[Matrix], Shape, Options], int] | None = None
    work: Work | None = None
    layer: Layer | None = None
    front: Callable[[Shape, Options], Front.Config] | None = None
    ladder: Callable[[Shape, Options], Ladder.Config] | None = None
    learns: Callable[[str], bool] = lambda name: True
    trained: Trained | None = None
    added_tokens: Callable[[Options], int] | None = None
    prefix_positions: Callable[[Options], int] | None = None
    along: Callable[[Shape, Options], tuple[float, float, float]] | None = None
    starts_as_base: bool = True
    merges: Literal["yes", "no", "per task", "is the base"] = "no"
    mixed: Literal["pool", "server", "no"] = "no"
    looks: Callable[[nn.Module, Iterable[Tensor]], None] | None = None
    speed: Callable[[str], float] = lambda name: 1.0
    written: Callable[[OwnAdapter], OwnAdapter] | None = None
    not_by_rows: str = ""
    parts_differ: str = ""
    memory: str = ""
    limits: str = ""
    needs_bias: bool = False
    setting: str | None = None
    only_peft: str | None = None
    way: str | None = None

    @property
    def trains_base(self) -> bool:
        """Whether what learns are parameters of the base."""
        return self.trained is not None

    @property
    def trains_all(self) -> bool:
        """Whether every parameter of the base learns."""
        return self.trained == "all"

    @property
    def trains_norms(self) -> bool:
        """Whether norms of the base learn."""
        return self.trained in ("norms", "all")

    @property
    def trains_little(self) -> bool:
        """Whether so little of the base learns that what it was is kept beside it."""
        return self.trained in ("biases", "norms")

    def trains(self, name: str) -> bool:
        """Whether the parameter of the base of this name learns."""
        return self.trained is not None and _IS_TRAINED[self.trained](name)

    @property
    def run_by(self) -> str:
        """Who runs it, for people."""
        if self.setting is not None:
            return f"Anabranch, in training with any method: --set {self.setting}"
        if self.way is not None:
            return f"Anabranch: {self.way}"
        if self.only_peft is not None:
            return f"peft ({self.peft_type}), on models of transformers in Python alone: {self.only_peft}"
        by_peft = f"Anabranch through peft ({self.peft_type}), which the extra peft brings"
        return {"own": "Anabranch", "peft": by_peft, "none": "nobody here"}[self.backend]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the functions, JSON-ready."""
        return {
            "id": self.id,
            "name": self.name,
            "family": self.family,
            "rule": self.rule,
            "where": self.where,
            "trainable": self.formula,
            "added_flops": self.flops_told(),
            "backend": self.backend,
            "peft_type": self.peft_type,
            "setting": self.setting,
            "way": self.way,
            "options": dict(self.options),
            "starts_as_base": self.starts_as_base,
            "merges": self.merges,
            "mixed_batch": self.mixed,
            "needs_bias": self.needs_bias,
            "memory": self.memory,
            "limits": self.limits,
            "papers": [{"name": one.name, "year": one.year, "arxiv": one.arxiv} for one in self.papers],
        }

    def flops_told(self) -> dict[str, str]:
        """FLOPs per token and adapted layer, in words: forward, backward, and once merged."""
        if self.added_tokens is not None:
            forward = "those of p more tokens in every sequence"
        elif self.along is not None:
            return {
                "forward": "twice the numbers that learn",
                "backward": "twice the forward ones, less those of gradients for hidden states, and those of the head; none of the model's",
                "merged": "twice the numbers that learn",
            }
        elif self.prefix_positions is not None:
            beside = "" if self.work is None else f", and {self.work.told}"
            forward = f"4 p d_q in attention of every layer{beside}"
        elif self.trains_base:
            forward = "0"
        else:
            forward = "not modelled" if self.work is None else self.work.told
        if forward == "not modelled":
            return {"forward": forward, "backward": forward, "merged": "0" if self.merges == "yes" else forward}
        merged = {"yes": "0", "is the base": "0", "per task": "0 for one task"}.get(self.merges, forward)
        backward = "twice the forward ones, less what need not reach below the first adapted layer"
        return {
            "forward": forward,
            "backward": backward if forward != "0" else "of the gradients of what learns",
            "merged": merged,
        }
