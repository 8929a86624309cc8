"""How well a model does on paths that are shorter: layers per token, how often it foretells what the whole model does, and nats per token.

Measured on what follows a prompt, token by token, all of them given. Decisions are made on the prompt, and its tokens run on the path too.
"""
# Shapes: N questions, L tokens or blocks, V vocabulary, C decisions

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.depth.decisions import decisions_of
from anabranch.depth.dr_llm.bank import RouterBank
from anabranch.depth.dr_llm.moves import Steps
from anabranch.depth.dr_llm.questions import Question
from anabranch.depth.dr_llm.routed import decide_prompts, logits_after, route_steps
from anabranch.depth.routed import PLAIN
from anabranch.depth.stack import BlockStack
from anabranch.errors import ConfigError, DataError, NotFiniteError
from anabranch.lm.generate import evaluating

__all__ = ["Measured", "Reference", "measure", "measure_paths", "reference_of"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reference:
    """What the whole model says of the tokens behind each prompt.

    Attributes:
        best: the likeliest token at each place.
        nats: of the tokens that are there, summed, for each question.
    """

    best: list[Tensor]
    nats: list[float]


@dataclass(frozen=True)
class Measured:
    """What came out.

    Attributes:
        num_blocks: L.
        questions: how many.
        tokens: that were foretold.
        layers_per_token: block runs of a token, of prompts and of what follows.
        agreement: share of places where the likeliest token is that of the whole model.
        accuracy: share of places where it is the one that is there.
        nats_per_token: mean negative log-likelihood.
        full_nats_per_token: the same of the whole model.
        full_accuracy: likewise.
        uses: runs of each block per question.
        decisions: how many of each kind: skip, run, repeat.
        seconds: in all passes.
        router_seconds: of these, in routers; None where nothing was decided.
        paths: of each question; none where decisions change from token to token.
        agreements: places that agree, by question, for tests of pairs.
    """

    num_blocks: int
    questions: int
    tokens: int
    layers_per_token: float
    agreement: float
    accuracy: float
    nats_per_token: float
    full_nats_per_token: float
    full_accuracy: float
    uses: list[float]
    decisions: list[int]
    seconds: float
    router_seconds: float | None = None
    paths: list[Steps] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For reports, without what is of single questions."""
        told = asdict(self)
        for name in ("paths", "agreements"):
            told.pop(name)
        return told


@torch.no_grad()
def reference_of(
    stack: BlockStack, questions: Sequence[Question], progress: Progress = lambda done, total: None
) -> Reference:
    """Run the whole model on all questions, once for all comparisons.

    Raises DataError where there are no questions or one has no answer, NotFiniteError where the model gives NaN.
    """
    _check(questions)
    best, nats = [], []
    with evaluating(stack.module):
        for number, question in enumerate(questions):
            progress(number, len(questions))
            logits_LV = _finite(logits_after(stack, question.prompt, question.answer), question)
            best.append(logits_LV.argmax(-1).cpu())
            nats.append(_nats(logits_LV, question.answer))
    progress(len(questions), len(questions))
    return Reference(best, nats)


def measure(
    stack: BlockStack,
    questions: Sequence[Question],
    bank: RouterBank,
    *,
    control: float = PLAIN,
    decide: Literal["prompt", "step"] = "prompt",
    reference: Reference | None = None,
    progress: Progress = lambda done, total: None,
) -> Measured:
    """Measure routers.

    Args:
        stack: of the model, which is in evaluation meanwhile.
        questions: prompts and what follows them.
        bank: of the model.
        control: the knob.
        decide: once, on the prompt; or anew for every token that goes in.
        reference: of `reference_of` for these questions; None computes it.
        progress: is told how many questions are done.

    Raises ConfigError for routers of another model, DataError as `reference_of`.
    """
    if decide not in ("prompt", "step"):
        raise ConfigError(f"decide is {decide!r}; it must be 'prompt' or 'step'")
    _check(questions)
    reference = reference or reference_of(stack, questions)
    started = time.perf_counter()
    with evaluating(stack.module):
        if decide == "prompt":
            made = decide_prompts(stack, bank, [question.prompt for question in questions], control)
            return measure_paths(
                stack,
                questions,
                made.paths,
                reference=reference,
                progress=progress,
                started=started,
                router_seconds=made.router_s,
            )
        tally = _Tally(stack.num_blocks, reference)
        for number, question in enumerate(questions):
            progress(number, len(questions))
            logits_LV, decision_SN = route_steps(stack, bank, question.prompt, question.answer, control)
            # The prompt's decisions hold for all its tokens, those of a later token for itself.
            tally.add(
                number, question, logits_LV, [len(question.prompt)] + [1] * (len(decision_SN) - 1), decision_SN.tolist()
            )
    progress(len(questions), len(questions))
    return tally.measured(time.perf_counter() - started, None, [])


def measure_paths(
    stack: BlockStack,
    questions: Sequence[Question],
    paths: Sequence[Steps],
    *,
    reference: Reference | None = None,
    progress: Progress = lambda done, total: None,
    started: float | None = None,
    router_seconds: float | None = None,
) -> Measured:
    """Measure a path for each question, as baselines have them.

    Args:
        stack: of the model, which is in evaluation meanwhile.
        questions: prompts and what follows them.
        paths: one of each question.
        reference: of `reference_of` for these questions; None computes it.
        progress: is told how many questions are done.
        started: when the clock began; None for now.
        router_seconds: that were spent on deciding.

    Raises ConfigError for another number of paths, or one that cannot be.
    """
    _check(questions)
    if len(paths) != len(questions):
        raise ConfigError(f"there are {len(paths)} paths for {len(questions)} questions; give one for each")
    reference = reference or reference_of(stack, questions)
    started = time.perf_counter() if started is None else started
    tally = _Tally(stack.num_blocks, reference)
    with evaluating(stack.module), torch.no_grad():
        for number, (question, path) in enumerate(zip(questions, paths, strict=True)):
            progress(number, len(questions))
            logits_LV = logits_after(stack, question.prompt, question.answer, path)
            length = len(question.prompt) + len(question.answer) - 1
            tally.add(number, question, logits_LV, [length], [decisions_of(path, stack.num_blocks)])
    progress(len(questions), len(questions))
    return tally.measured(time.perf_counter() - started, router_seconds, list(paths))


class _Tally:
    """Sums over questions."""

    def __init__(self, num_blocks: int, reference: Reference) -> None:
        self._num_blocks, self._reference = num_blocks, reference
        self._tokens = self._given = 0
        self._same = self._right = self._full_right = 0
        self._nats = 0.0
        self._run_L = torch.zeros(num_blocks, dtype=torch.float64)
        self._decision_C = torch.zeros(3, dtype=torch.int64)
        self._agreements: list[float] = []

    def add(
        self, number: int, question: Question, logits_LV: Tensor, lengths: list[int], decisions: list[list[int]]
    ) -> None:
        """A question: its passes have so many tokens, and run blocks so often."""
        best_L = _finite(logits_LV, question).argmax(-1).cpu()
        answer_L = torch.tensor(list(question.answer))
        same_L = best_L == self._reference.best[number]
        self._same += int(same_L.sum())
        self._right += int((best_L == answer_L).sum())
        self._full_right += int((self._reference.best[number] == answer_L).sum())
        self._nats += _nats(logits_LV, question.answer)
        self._tokens += len(answer_L)
        self._given += sum(lengths)
        self._agreements.append(float(same_L.double().mean()))
        for length, row in zip(lengths, decisions, strict=True):
            decision_L = torch.tensor(row)
            self._run_L += length * decision_L
            self._decision_C += torch.bincount(decision_L, minlength=3)

    def measured(self, seconds: float, router_seconds: float | None, paths: list[Steps]) -> Measured:
        """Means."""
        return Measured(
            num_blocks=self._num_blocks,
            questions=len(self._agreements),
            tokens=self._tokens,
            layers_per_token=float(self._run_L.sum()) / self._given,
            agreement=self._same / self._tokens,
            accuracy=self._right / self._tokens,
            nats_per_token=self._nats / self._tokens,
            full_nats_per_token=sum(self._reference.nats) / self._tokens,
            full_accuracy=self._full_right / self._tokens,
            uses=(self._run_L / self._given).tolist(),
            decisions=self._decision_C.tolist(),
            seconds=seconds,
            router_seconds=router_seconds,
            paths=paths,
            agreements=self._agreements,
        )


def _check(questions: Sequence[Question]) -> None:
    if not questions:
        raise DataError("there are no questions to measure on; give at least one")
    for question in questions:
        if not question.prompt or not question.answer:
            raise DataError(
                f"question {question.id!r} has no prompt, or nothing follows it; both need at least one token"
            )


def _nats(logits_LV: Tensor, tokens: Sequence[int]) -> float:
    log_p_LV = logits_LV.float().log_softmax(-1)
    place_L1 = torch.tensor(list(tokens), device=log_p_LV.device).unsqueeze(1)
    return -float(log_p_LV.gather(1, place_L1).double().sum())


def _finite(logits_LV: Tensor, question: Question) -> Tensor:
    if not bool(torch.isfinite(logits_LV).all()):
        raise NotFiniteError(
            f"the model gives NaN or infinite logits on question {question.id!r}; check its weights and dtype"
        )
    return logits_LV
