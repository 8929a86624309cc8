"""Batched generation with a key-value cache: greedy, temperature, top-k, top-p, stop tokens, and a seed."""
# Shapes: B batch, L positions, V vocabulary

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Seed, Size, configclass
from anabranch.errors import NotFiniteError
from anabranch.lm.decoder import Decoder
from anabranch.lm.distribution import cut, temper
from anabranch.lm.token_ids import check_token_ids


@configclass
class SamplingConfig(BaseConfig):
    """How the next token is chosen.

    Attributes:
        max_tokens: most new tokens per sequence.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: sample among the k most likely; None among all.
        top_p: sample among the most likely whose probabilities reach p (nucleus sampling).
        stop: token ids that end a sequence; the stop token is not part of the result.
        seed: of the sampling generator.
    """

    max_tokens: int = Field(default=128, ge=0)
    temperature: float = Field(default=0.8, ge=0)
    top_k: Size | None = Field(default=None, ge=1)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop: tuple[int, ...] = ()
    seed: Seed = 0


@dataclass(frozen=True)
class Step:
    """New tokens of one decoding step: ``tokens[i]`` continues sequence ``rows[i]``."""

    rows: list[int]
    tokens: list[int]


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig | None = None,
    *,
    num_streams: int | None = None,
) -> list[list[int]]:
    """Continue each prompt; returns the new tokens of each. ``num_streams`` as of `Decoder.forward`.

    Raises ConfigError for an empty prompt, a prompt that is no list of ids of the vocabulary, or streams that the model does not have.
    """
    check_prompts(model, prompts)
    results: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, config, num_streams=num_streams):
        for row, token in zip(step.rows, step.tokens, strict=True):
            results[row].append(token)
    return results


@torch.inference_mode()
def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig | None = None,
    *,
    num_streams: int | None = None,
) -> Iterator[Step]:
    """Like `generate`, but yields each step as it is made. Sequences that stop leave the batch."""
    config = config or SamplingConfig()
    check_prompts(model, prompts)
    device = model.embedding.weight.device
    generator = torch.Generator(device=device).manual_seed(config.seed)
    token_BL, mask_BL = pad_left(prompts, device)
    # Said only where it is asked for: models that are not ours have no such argument.
    chosen: dict[str, int] = {} if num_streams is None else {"num_streams": num_streams}
    cache = model.new_cache(token_BL.shape[1] + config.max_tokens, **chosen)
    rows = list(range(len(prompts)))
    for _ in range(config.max_tokens if prompts else 0):
        # Between steps the model is as it was: another stream of it may run, or end.
        with evaluating(model):
            logits_BV = model(token_BL, cache=cache, token_mask_BL=mask_BL, last_only=True, **chosen).logits_BLV[:, -1]
        next_B = sample(logits_BV, config, generator)
        # Of a model that several processes run together.
        agreed: Callable[[Tensor], Tensor] | None = getattr(model, "agreed", None)
        if agreed is not None:
            next_B = agreed(next_B)
        going = [token not in config.stop for token in next_B.tolist()]
        if not all(going):
            keep_B = torch.tensor(going, device=device)
            next_B = next_B[keep_B]
            rows = [row for row, on in zip(rows, going, strict=True) if on]
            cache.keep_rows(keep_B)
        if not rows:
            return
        yield Step(list(rows), next_B.tolist())
        token_BL, mask_BL = next_B.unsqueeze(1), None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation; afterwards each of its modules is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def sample(logits_BV: Tensor, config: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
    """token_B from ``logits_BV`` by the rules of ``config``. Raises NotFiniteError if a row has no largest number, such as with NaN."""
    best_B = logits_BV.amax(-1)
    if not bool(best_B.isfinite().all()):
        row = int((~best_B.isfinite()).nonzero()[0])
        raise NotFiniteError(
            f"row {row} has logits that are not numbers (the largest is {best_B[row]:g}): check the model's weights"
        )
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    rows, device = len(logits_BV), logits_BV.device
    probability_BV = cut(
        temper(logits_BV, torch.full((rows,), config.temperature, device=device)),
        top_k_R=torch.full((rows,), config.top_k or 0, device=device),
        top_p_R=torch.full((rows,), config.top_p, device=device),
    )
    return torch.multinomial(probability_BV, 1, generator=generator).squeeze(-1)


def check_prompts(model: Decoder, prompts: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError for an empty prompt, one with ids outside the vocabulary, and what is no list of ids."""
    check_token_ids(prompts, model.config.vocab_size)


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(token_BL, mask_BL) of prompts that end together; the mask, False for padding, is None where there is none."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    token_BL = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask_BL = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        token_BL[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BL[row, longest - len(prompt) :] = True
    return token_BL.to(device), None if bool(mask_BL.all()) else mask_BL.to(device)
