"""Cards of many LoRAs together: under a router, shared by tasks, or added up."""

from typing import Any

from anabranch.adapters.catalogue.card import Card, Op, Options, Paper, Work
from anabranch.adapters.catalogue.shape import Matrix, Shape
from anabranch.adapters.catalogue.works import each, low_rank
from anabranch.adapters.mhr import MultiHeadRouted
from anabranch.adapters.routed import RoutedLowRank
from anabranch.routing import Balancer, Router, SwitchLoss, TopK

__all__ = ["CARDS"]

_QV = ("q", "v")
# What `anabranch adapt` adapts by `*.attention.*`.
_ATTENTION = ("q", "k", "v", "o")


def _many(matrix: Matrix, options: Options) -> int:
    return options["number"] * low_rank(matrix, options)


_TASKS = Work(
    "2 r (C + O), and 2 K r (C + O) once per pass and task",
    lambda matrix, options: [
        Op(2 * options["rank"] * matrix.in_dim, per_call=2 * options["number"] * options["rank"] * matrix.in_dim),
        Op(
            2 * options["rank"] * matrix.out_dim,
            takes_x=False,
            per_call=2 * options["number"] * options["rank"] * matrix.out_dim,
        ),
    ],
)


_ROUTER = "a router chooses for each token, so it cannot be merged; DynMoLE and LoRA-Mixer are more of this kind"


def _active(options: Options) -> int:
    """How many LoRAs a token goes through."""
    return options.get("active", options["number"])


_ROUTED_WORK = Work(
    "2 K C of the router, and 2 k r (C + O) of the k LoRAs that a token goes through",
    lambda matrix, options: [
        Op(2 * options["number"] * matrix.in_dim),
        Op(2 * _active(options) * options["rank"] * matrix.in_dim),
        Op(2 * _active(options) * options["rank"] * matrix.out_dim, takes_x=False),
    ],
)


def _routed_layer(matrix: Matrix, shape: Shape, options: Options, *balance: Balancer.Config) -> RoutedLowRank.Config:
    """The LoRAs that a token goes through are the best, by the softmax of their scores."""
    number = options["number"]
    return RoutedLowRank.Config(
        ranks=(options["rank"],) * number,
        alphas=(float(options["alpha"]),) * number,
        router=Router.Config(select=TopK.Config(top_k=_active(options), normalize="sum"), balance=balance),
    )


def _balanced_layer(matrix: Matrix, shape: Shape, options: Options) -> RoutedLowRank.Config:
    return _routed_layer(matrix, shape, options, SwitchLoss.Config(alpha=0.01))


def _task_layer(matrix: Matrix, shape: Shape, options: Options) -> MultiHeadRouted.Config:
    return MultiHeadRouted.Config(
        tasks=tuple(map(str, range(options["tasks"]))),
        skills=options["number"],
        heads=options["heads"],
        rank=options["rank"],
        alpha=float(options["alpha"]),
    )


def _routed(id: str, name: str, rule: str, paper: Paper, **others: Any) -> Card:
    """K LoRAs of a layer and a router of K C weights."""
    usual: dict[str, Any] = {
        "limits": _ROUTER,
        "options": {"rank": 8, "alpha": 16.0, "number": 4, "targets": _QV},
        "work": _ROUTED_WORK,
    }
    return Card(
        id,
        name,
        "reparameterised/multi-LoRA",
        rule,
        "beside each chosen linear layer",
        "K r (C + O) + K C of a router",
        (paper,),
        count=each(lambda matrix, options: _many(matrix, options) + options["number"] * matrix.in_dim),
        mixed="server" if others.get("backend") == "own" else "no",
        **(usual | others),
    )


def _tasks(id: str, name: str, rule: str, formula: str, paper: Paper, heads: int) -> Card:
    """K LoRAs that tasks share by learned selectors; usual values are those of `anabranch adapt`."""
    return Card(
        id,
        name,
        "reparameterised/multi-LoRA",
        rule,
        "beside each chosen linear layer",
        formula,
        (paper,),
        backend="own",
        peft_type="POLY",
        options={"rank": 16, "alpha": 1.0, "number": 8, "tasks": 1, "heads": heads, "targets": _ATTENTION},
        count=each(
            lambda matrix, options: _many(matrix, options) + options["tasks"] * options["number"] * options["heads"]
        ),
        work=_TASKS,
        layer=_task_layer,
        merges="per task",
        mixed="server",
        limits="each row of a batch names its task; `anabranch adapt --method` trains it",
    )


CARDS = (
    Card(
        "lorahub",
        "LoRAHub",
        "reparameterised/multi-LoRA",
        "halves of K trained LoRAs added up with weights that a search without gradients finds",
        "as the LoRAs that it mixes",
        "K numbers",
        (Paper("LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition", 2023, "2307.13269"),),
        options={"number": 4},
        count=lambda matrices, shape, options: options["number"],
        merges="yes",
        mixed="pool",
        limits="`adapters merge --method linear --model MODEL --data ROWS` finds the weights by a few rows",
        way="anabranch adapters merge --method linear --model MODEL --data ROWS",
    ),
    _routed(
        "molora",
        "MoLoRA",
        "y = W x + sum_k p_k(x) s B_k A_k x with soft weights of every token",
        Paper(
            "Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction Tuning",
            2023,
            "2309.05444",
        ),
        backend="own",
        layer=_routed_layer,
    ),
    _routed(
        "mole",
        "MoLE",
        "trained LoRAs, weighed layer by layer by a learned gate",
        Paper("Mixture of LoRA Experts", 2024, "2404.13628"),
    ),
    _routed(
        "mixlora",
        "MixLoRA",
        "LoRAs of the feed-forward layer as experts, the best two of which a router takes for each token, with a loss for balance",
        Paper(
            "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts",
            2024,
            "2404.15159",
        ),
        backend="own",
        options={"rank": 8, "alpha": 16.0, "number": 4, "active": 2, "targets": ("gate", "up", "down")},
        layer=_balanced_layer,
        parts_differ="the balance loss is a product of two means, which parts have not in common",
    ),
    _routed(
        "mola",
        "MoLA",
        "MixLoRA with more experts in higher layers",
        Paper("Higher Layers Need More LoRA Experts", 2024, "2402.08562"),
        way="mola of anabranch.adapters, in Python",
    ),
    _tasks(
        "poly",
        "Poly",
        "s (sum_k z_tk B_k)(sum_k z_tk A_k), halves added up first, with learned selectors z of task t and skill k",
        "K r (C + O) + T K per layer",
        Paper("Combining Parameter-efficient Modules for Task-level Generalisation", 2022, "2202.13914"),
        1,
    ),
    _tasks(
        "mhr",
        "MHR",
        "Poly whose selectors choose for each of h slices of the inputs apart",
        "K r (C + O) + T K h per layer",
        Paper("Multi-Head Adapter Routing for Cross-Task Generalization", 2022, "2211.03831"),
        8,
    ),
    _routed(
        "xlora",
        "X-LoRA",
        "trained LoRAs, weighed for each token and layer by what the model without them has seen",
        Paper("X-LoRA: Mixture of Low-Rank Adapter Experts", 2024, "2402.07148"),
        peft_type="XLORA",
        limits="runs the model twice; peft has it, and puts it on from the folders of trained LoRAs, which are no options",
    ),
    Card(
        "arrow",
        "Arrow",
        "reparameterised/multi-LoRA",
        "trained LoRAs, chosen for each token by the first right singular vector of each",
        "as the LoRAs that it chooses among",
        "none",
        (Paper("Towards Modular LLMs by Building and Reusing a Library of LoRAs", 2024, "2405.11157"),),
        count=lambda matrices, shape, options: 0,
        mixed="server",
        way="anabranch serve MODEL --adapter NAME=arrow:POOL, and adapters route POOL QUERY --model MODEL --local arrow",
    ),
)
