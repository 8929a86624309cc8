"""The arm ``ssm`` of the study of LoRA-Mixer: experts and routers in the projections of a state space, transformers' Mamba.

The base is a Mamba of two blocks that learned the single steps of the bench. Three pairs of steps have an expert each, beside ``in_proj``,
``x_proj``, ``dt_proj`` and ``out_proj``, trained on its task alone; routers learn from mixed rows with the loss of ours, and use two of
three experts afterwards.
"""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters import (
    Labelled,
    fit_joint,
    fit_router,
    labelled_rows,
    load_mixture,
    read_peft,
    static_mixture,
    write_peft,
)
from anabranch.adapters.lora_mixer import SoftThenTopK, passing
from anabranch.adapters.low_rank import Pair, draw_a
from anabranch.adapters.peft_folder import Adapter, described
from anabranch.config import Config, Field, configclass, to_dict
from anabranch.data import ByteTokenizer
from anabranch.extras import require
from anabranch.files import sha256_of
from anabranch.routing import LinearScore, Router
from anabranch.studies.adapter_bench import (
    LEARNED,
    STEPS,
    BenchSize,
    _tensors,
    bench_words,
    kept_folder,
    name_of,
    pair_rows,
    whole_base,
)
from anabranch.studies.harness import Metrics, Progress
from anabranch.train import Examples, Losses, Task, TaskContext, TaskRunConfig, TrainConfig, Trainer

if TYPE_CHECKING:
    from anabranch.studies.lora_mixer import Size

# All projections of a block of Mamba.
TARGETS = ("in_proj", "x_proj", "dt_proj", "out_proj")
IGNORED = -100
Pairs = Sequence[Sequence[str]]


@configclass
class StateSpaceSize(Config):
    """Of the arm ``ssm``.

    Attributes:
        dim, state, num_layers: of the base.
        base_steps, base_batch, base_rate: its training on single steps.
        tasks: pairs of steps, and experts; ``top_k`` of them work for a token afterwards.
        rows: mixed rows that routers learn from.
        expert_steps, router_steps, batch_size, learning_rate: of experts and routers.
    """

    dim: int = 96
    state: int = 8
    num_layers: int = 2
    base_steps: int = Field(default=3000, ge=1)
    base_batch: int = 32
    base_rate: float = 4e-3
    tasks: int = Field(default=3, ge=2)
    top_k: int = Field(default=2, ge=1)
    rows: int = Field(default=480, ge=1)
    expert_steps: int = Field(default=400, ge=1)
    router_steps: int = Field(default=300, ge=1)
    batch_size: int = 32
    learning_rate: float = 3e-3


class Singles(Task):
    """The base: single steps, learned by all of a module that is called with ``input_ids``; loss on answers alone."""

    headline: ClassVar[str] = "answer"

    @configclass
    class Config(Task.Config):
        """Attributes: ``bench``, whose words."""

        bench: BenchSize = BenchSize()

    config: Config

    def training_data(self, context: TaskContext) -> Examples:
        """Each word under each step."""
        words, _ = bench_words(self.config.bench)
        rows = pair_rows([(step,) for step in STEPS], words, per_task=len(words), seed=0)
        return Examples(*_tensors(rows, ByteTokenizer.Config().build()), seed=context.settings.seed)

    def step(self, model: nn.Module, batch: tuple[Tensor, ...], context: TaskContext) -> Losses:
        """Cross-entropy of answers."""
        token_BL, target_BL = batch
        logits_BLV = model(input_ids=token_BL.long(), use_cache=False).logits
        return Losses.of(
            answer=F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.long().flatten(), ignore_index=IGNORED)
        )


def state_space(size: StateSpaceSize, seed: int = 0) -> Any:
    """A new Mamba of transformers. Raises MissingExtraError where that is not here."""
    require("huggingface", by="the arm ssm of the study")
    import transformers

    vocab = ByteTokenizer.Config().build().vocab_size
    config = transformers.MambaConfig(
        vocab_size=vocab, hidden_size=size.dim, state_size=size.state, num_hidden_layers=size.num_layers, pad_token_id=0
    )
    # transformers draws from the generator of all; the next one finds it as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.MambaForCausalLM(config).eval()


def learned_base(size: StateSpaceSize, bench: BenchSize) -> Any:
    """The base, which is trained once on a machine."""

    def make(folder: Path) -> Path:
        train = _train(size.base_steps, size.base_batch, size.base_rate, seed=0)
        run = TaskRunConfig(task=Singles.Config(bench=bench), train=train)
        return whole_base(Trainer(run, folder, model=state_space(size)).fit())

    told = ["state space", to_dict(size), to_dict(bench), sha256_of(Path(__file__))]
    model = state_space(size)
    Singles(Singles.Config(bench=bench)).load(kept_folder(told, make), model)
    return model


def run(size: "Size", seed: int, progress: Progress) -> Metrics:
    """Train the experts, each on its task, then routers; measure them, the average of the experts, and each task's own."""
    own = size.ssm
    pairs = LEARNED[:: len(LEARNED) // own.tasks][: own.tasks]
    names = [name_of(pair) for pair in pairs]
    words, held = bench_words(size.bench)
    measured = labelled(pairs, held, per_task=len(held), seed=1)
    progress("base")
    base = learned_base(own, size.bench)
    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
        place = Path(folder)
        experts = {}
        for number, pair in enumerate(pairs):
            progress(f"expert {number + 1}")
            rows = labelled([pair], words, per_task=size.expert_rows, seed=seed + number)
            experts[names[number]] = trained_expert(base, rows, place / str(number), size, seed=seed + number)
        progress("routers")
        mixture = load_mixture(experts, copy.deepcopy(base), top_k=own.top_k, seed=seed)
        mixed = labelled(pairs, words, per_task=max(1, own.rows // own.tasks), seed=seed + 100)
        train = _train(own.router_steps, own.batch_size, own.learning_rate, seed=seed)
        report = fit_router(mixture, mixed, place / "routers", train=train, held_out=measured).report
        write_peft(place / "uniform", static_mixture(mixture, [1 / own.tasks] * own.tasks))
        even = [min(facts.load) / max(facts.load) for facts in report.routers]
        return {
            "accuracy": accuracy(mixture, measured),
            "oracle": accuracy(mixture, measured, by_label=True),
            "uniform": accuracy(with_adapter(base, place / "uniform"), measured),
            "nats": report.mean("nats"),
            "evenness": sum(even) / len(even),
        }


def labelled(pairs: Pairs, words: Sequence[str], *, per_task: int, seed: int) -> Labelled:
    """Rows of these tasks, each with its expert."""
    tokenizer = ByteTokenizer.Config().build()
    assert tokenizer.eos_id is not None
    rows: list[tuple[Sequence[int], Sequence[int], str | None]] = [
        (tokenizer.encode(row["input"] + "\n"), [*tokenizer.encode(row["output"]), tokenizer.eos_id], row["task"])
        for row in pair_rows(pairs, words, per_task=per_task, seed=seed)
    ]
    return Labelled.of(rows, [name_of(pair) for pair in pairs])


def trained_expert(base: Any, rows: Labelled, place: Path, size: "Size", *, seed: int) -> Path:
    """A folder of peft's: LoRA on all projections of a copy of ``base``, trained on these rows."""
    own, generator = size.ssm, torch.Generator().manual_seed(seed)
    pairs = {}
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            a_RC = torch.empty(size.rank, module.in_features)
            draw_a(a_RC, generator)
            pairs[name] = Pair(a_RC, torch.zeros(module.out_features, size.rank), size.alpha)
    write_peft(place / "new", Adapter(described({"task_type": "CAUSAL_LM"}, pairs), pairs))
    alone = Router.Config(score=LinearScore.Config(), select=SoftThenTopK.Config(top_k=1))
    model = load_mixture({"new": place / "new"}, copy.deepcopy(base), router=alone)
    train = _train(own.expert_steps, own.batch_size, own.learning_rate, seed=seed)
    fit_joint(model, rows, place / "run", train=train, stages="hard", alignment=0.0)
    write_peft(place / "trained", static_mixture(model, (1.0,)))
    return place / "trained"


def with_adapter(base: Any, folder: Path) -> Any:
    """A copy of ``base`` that has the adapter in its matrices."""
    made = copy.deepcopy(base)
    with torch.no_grad():
        for name, pair in read_peft(folder).pairs.items():
            made.get_submodule(name).weight += pair.delta()
    return made


@torch.no_grad()
def accuracy(model: Any, rows: Labelled, *, by_label: bool = False) -> float:
    """The share of answers that greedy decoding gets right: those of whose letters each is the likeliest after the right ones.

    ``by_label`` lets the expert of its task alone work for each row.
    """
    right = 0
    for start in range(0, len(rows.token_NL), 64):
        token_BL, target_BL, expert_B, mask_BL = (tensor[start : start + 64] for tensor in rows.tensors)
        told = labelled_rows(expert_B, token_BL.shape[1]) if by_label else None
        with passing(model, mask_BL=mask_BL, labels=told):
            best_BL = model(input_ids=token_BL, attention_mask=mask_BL.long(), use_cache=False).logits.argmax(-1)
        right += int(((best_BL == target_BL) | (target_BL == IGNORED)).all(1).sum())
    return right / len(rows.token_NL)


def _train(steps: int, batch_size: int, rate: float, *, seed: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=rate,
        weight_decay=0.0,
        eval_every=None,
        checkpoint_every=None,
        device="cpu",
        seed=seed,
    )
