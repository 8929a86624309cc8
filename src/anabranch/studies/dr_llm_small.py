"""The arm ``small`` of the study of Dr.LLM: a decoder trained here on chains of steps, whose depth can be searched in minutes."""
# Shapes: B sequences, L positions

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anabranch.depth.dr_llm import (
    FitConfig,
    Labels,
    Measured,
    NextToken,
    Question,
    RouterBank,
    SearchConfig,
    SearchReport,
    baselines_at,
    influence_of,
    labels_of,
    measure,
    reference_of,
    search_paths,
    train_routers,
)
from anabranch.depth.dr_llm.evaluate import Reference
from anabranch.depth.stack import BlockStack, stack_of
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.studies.harness import Metrics, Progress

if TYPE_CHECKING:
    from anabranch.studies.dr_llm import Size

# Tokens: ten digits, then signs.
POINTERS, SUMS, SEPARATOR, EQUALS, PLUS, MINUS, TIMES = range(10, 17)
VOCABULARY = 17
MOST_STEPS = 6
# Numbers that questions are drawn with. What is searched is never measured; the model's training may have seen either.
_SEARCHED, _HELD_OUT = 2, 3
# Looks for the control at which routers take as many layers as others.
_LOOKS = 8


def run(size: "Size", seed: int, progress: Progress) -> Metrics:
    """Train the model, search, train routers in three ways, and measure all of them."""
    progress("training the model")
    stack = stack_of(trained(size, seed, progress))
    searched = questions(size.questions, seed, _SEARCHED)
    held_out = questions(size.held_out, seed, _HELD_OUT, but=searched)
    progress("search")
    config = SearchConfig(simulations=size.simulations, probe=size.probe, stop_saving=None, seed=seed)
    found = search_paths(stack, searched, NextToken(), config, progress=teller(progress))
    labels = labels_of(found.rows, flips=found.keeps_flips)
    reference = reference_of(stack, held_out)
    metrics = facts_of(found)
    for name, changes in (("", {}), ("_plain", {"gamma": 0.0, "balance": False}), ("_first", {"features": "first"})):
        progress(f"routers{name}")
        bank, f1 = fitted(stack, labels, FitConfig(epochs=size.epochs, seed=seed).replace(**changes))
        made = measure(stack, held_out, bank, reference=reference)
        if name == "_first":
            made = at_layers(stack, held_out, bank, float(metrics["layers"]), reference)
        metrics[f"macro_f1{name}"] = f1
        metrics[f"accuracy{name}"] = made.accuracy
        metrics[f"agreement{name}"] = made.agreement
        metrics[f"layers{name}"] = made.layers_per_token
    metrics["base_accuracy"] = made.full_accuracy
    metrics["first_is_near"] = -abs(float(metrics["layers_first"]) - float(metrics["layers"]))
    metrics["saved_layers"] = stack.num_blocks - float(metrics["layers"])
    influence = influence_of(stack, searched, limit=256)
    beside = baselines_at(stack, held_out, float(metrics["layers"]), influence, reference=reference, seed=seed)
    for name, one in beside.items():
        metrics[f"accuracy_{name}"], metrics[f"agreement_{name}"] = one.accuracy, one.agreement
    return metrics


def at_layers(
    stack: BlockStack, questions: Sequence[Question], bank: RouterBank, layers: float, reference: Reference
) -> Measured:
    """Routers at the control at which they take nearest to ``layers`` of mean depth, which grows with the control; found by halving."""
    low, high = -1.0, 1.0
    found = []
    for _ in range(_LOOKS):
        middle = (low + high) / 2
        made = measure(stack, questions, bank, control=middle, reference=reference)
        found.append(made)
        low, high = (middle, high) if made.layers_per_token < layers else (low, middle)
    return min(found, key=lambda made: abs(made.layers_per_token - layers))


def fitted(stack: BlockStack, labels: Labels, config: FitConfig) -> tuple[RouterBank, float]:
    """Routers, and their macro-F1 on labels that were held out."""
    bank, report = train_routers(stack, labels, config)
    return bank, (report.held_out or report.learned).macro_f1


def facts_of(found: SearchReport) -> Metrics:
    """What a search says of paths and of flips."""
    told, control = found.to_dict(), found.control
    assert control is not None, "flips are held against the control"
    probe = max(control.probe, 1)
    return {
        "base_right": told["base_right"],
        "path_saving": told["mean_saving"],
        "shorter_by_3": told["shorter_by_3"],
        "prefix_gain": told["prefix_gain"],
        "evaluations": told["evaluations"],
        "flip_probe": control.probe,
        "flip_truth": control.truth / probe,
        "flip_decoy": control.decoy / probe,
        "flip_p": control.p_value,
        "keeps_flips": found.keeps_flips,
    }


def teller(progress: Progress, every: int = 50) -> Callable[[int, int, str], None]:
    """Says every so many questions how far a search is."""

    def tell(done: int, total: int, what: str) -> None:
        if done % every == 0:
            progress(f"{what} {done} of {total}")

    return tell


def trained(size: "Size", seed: int, progress: Progress) -> Decoder:
    """The model, whose layers were left out now and then so that edits of depth are tolerated."""
    config = Decoder.Config(
        vocab_size=VOCABULARY,
        dim=size.dim,
        num_layers=size.num_layers,
        attention=SelfAttention.Config(num_heads=size.num_heads),
        feed_forward=SwiGLU.Config(hidden_dim=size.dim * 8 // 3),
        max_positions=64,
    )
    model = config.build(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=size.learning_rate, total_steps=max(size.steps, 2), pct_start=0.05
    )
    draw = random.Random(f"{seed} learned")
    for step in range(size.steps):
        token_BL, target_BL = batch([drawn(draw) for _ in range(size.batch_size)])
        path = [layer for layer in range(size.num_layers) if draw.random() >= size.layer_dropout]
        loss = model(token_BL, target_BL, path=path).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            progress(f"step {step} of {size.steps}, loss {float(loss.detach()):.3f}")
    return model.eval()


def batch(rows: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """(token_BL, target_BL): only the answer is learned, which follows the last token of a prompt."""
    longest = max(len(prompt) for prompt, _ in rows)
    token_BL = torch.zeros(len(rows), longest, dtype=torch.int64)
    target_BL = torch.full_like(token_BL, -100)
    for place, (prompt, answer) in enumerate(rows):
        token_BL[place, : len(prompt)] = torch.tensor(prompt)
        target_BL[place, len(prompt) - 1] = answer
    return token_BL, target_BL


def questions(count: int, seed: int, part: int, but: Sequence[Question] = ()) -> list[Question]:
    """Different questions, none of which is among ``but``."""
    draw, taken = random.Random(f"{seed} {part}"), {question.prompt for question in but}
    found: list[Question] = []
    while len(found) < count:
        prompt, answer = drawn(draw)
        if tuple(prompt) not in taken:
            taken.add(tuple(prompt))
            found.append(Question(f"{part}-{len(found)}", tuple(prompt), (answer,), answer_text=str(answer)))
    return found


def drawn(draw: random.Random) -> tuple[list[int], int]:
    """(prompt, answer) of one or the other task, in 1 to 6 steps."""
    steps = draw.randint(1, MOST_STEPS)
    return pointers(draw, steps) if draw.random() < 0.5 else sums(draw, steps)


def pointers(draw: random.Random, steps: int) -> tuple[list[int], int]:
    """Ten arrows that make one circle, a start, and how many arrows to follow."""
    circle = draw.sample(range(10), 10)
    after = {node: circle[(place + 1) % 10] for place, node in enumerate(circle)}
    arrows = [token for node in draw.sample(range(10), 10) for token in (node, after[node])]
    start = node = draw.randrange(10)
    for _ in range(steps):
        node = after[node]
    return [POINTERS, *arrows, SEPARATOR, start, steps, EQUALS], node


def sums(draw: random.Random, steps: int) -> tuple[list[int], int]:
    """A chain of operations modulo 10, from the left."""
    value = draw.randrange(10)
    tokens = [SUMS, value]
    for _ in range(steps):
        sign, other = draw.choice((PLUS, MINUS, TIMES)), draw.randrange(10)
        value = {PLUS: value + other, MINUS: value - other, TIMES: value * other}[sign] % 10
        tokens += [sign, other]
    return [*tokens, EQUALS], value
