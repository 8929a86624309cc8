"""Measuring a model on text: nats per token and bits per byte over windows that do not overlap."""
# Shapes: B windows, L positions, V vocabulary, M domains

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.cluster.ring import ContextParallel
from anabranch.data.batch import Batch
from anabranch.lm.generate import evaluating


class EvaluationWindows(Protocol):
    """What is evaluated: batches with byte lengths, and the names of their domains (`anabranch.data.Windows`)."""

    domains: tuple[str, ...]

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Evaluation:
    """How well text is predicted.

    Attributes:
        nats_per_token: mean cross-entropy.
        bits_per_byte: the same per byte of text, comparable between tokenizers; nan if the tokens stand for no bytes.
        tokens: predicted tokens.
        bytes: bytes of text under them.
        by_domain: the same for each domain that occurs, empty if there is one only.
    """

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int
    by_domain: dict[str, "Evaluation"] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain: dict[str, Any] = {
            "nats_per_token": self.nats_per_token,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }
        if self.by_domain:
            plain["by_domain"] = {name: part.to_dict() for name, part in self.by_domain.items()}
        return plain

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> "Evaluation":
        """Back from `to_dict`, also after JSON; other entries are left aside."""
        rates = (table[name] for name in ("nats_per_token", "bits_per_byte"))
        nats, bits = (math.nan if rate is None else rate for rate in rates)
        parts = {name: cls.from_dict(part) for name, part in table.get("by_domain", {}).items()}
        return cls(nats, bits, table["tokens"], table["bytes"], parts)


def evaluate(
    model: nn.Module,
    windows: EvaluationWindows,
    *,
    precision: str = "float32",
    equal_passes: bool = False,
    copies: int = 1,
) -> Evaluation:
    """Evaluate ``model`` on ``windows``, on the device where it is, in evaluation mode.

    In a process group every rank brings its own part of the windows and gets the result of all.

    Args:
        model: a `Decoder`, or what is called like one.
        windows: of one split or text, see `anabranch.data.Windows`.
        precision: ``float32``, or ``bfloat16`` autocast.
        equal_passes: repeat forward passes on ranks that have fewer batches (a sharded model communicates in each).
        copies: how many ranks bring the same part of the windows, since they share its sequences.
    """
    device = next(model.parameters()).device
    # Nats, tokens, bytes.
    total_3M = torch.zeros(3, len(windows.domains), dtype=torch.float64, device=device)
    with evaluation_mode(model), autocast(device, precision):
        for batch, counts in _batches(windows, device, equal_passes):
            nats_BL = _nats(model, batch)
            if counts:
                _add(total_3M, nats_BL, batch)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total_3M)
        total_3M /= copies
    parts = {name: _evaluation(total_3M[:, place]) for place, name in enumerate(windows.domains)}
    parts = {name: part for name, part in parts.items() if part.tokens}
    overall = _evaluation(total_3M.sum(1))
    return overall if len(parts) < 2 else Evaluation(**{**vars(overall), "by_domain": parts})


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 autocast if ``precision`` is ``bfloat16``, nothing otherwise."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def _nats(model: nn.Module, batch: Batch) -> Tensor:
    """Of each target."""
    if isinstance(model, ContextParallel):
        # Logits of a whole sequence are what no process may have room for.
        return model.token_nats(batch.token_BL, batch.target_BL)
    logits_BLV = model(batch.token_BL).logits_BLV
    nats_N = F.cross_entropy(logits_BLV.flatten(0, 1).float(), batch.target_BL.flatten(), reduction="none")
    return nats_N.view_as(batch.target_BL)


def _add(total_3M: Tensor, nats_BL: Tensor, batch: Batch) -> None:
    nats_B = nats_BL.double().sum(1)
    tokens_B = torch.full_like(nats_B, batch.target_BL.shape[1])
    bytes_B = torch.zeros_like(nats_B) if batch.byte_length_BL is None else batch.byte_length_BL.sum(1).double()
    total_3M.index_add_(1, batch.domain_B, torch.stack([nats_B, tokens_B, bytes_B]))


def _batches(windows: Iterable[Batch], device: torch.device, equal_passes: bool) -> Iterator[tuple[Batch, bool]]:
    """Batches with True; where passes must be equal in number, also some with False that do not count.

    Ranks agree before each pass whether there is one: asked afterwards, the rank that is done would wait in another collective than
    the one in whose forward pass the others communicate.
    """
    if not equal_passes or not dist.is_initialized():
        yield from ((batch.to(device, non_blocking=True), True) for batch in windows)
        return
    zero = torch.zeros(1, 1, dtype=torch.int64)
    last, batches = Batch(zero, zero, zero[0]), iter(windows)
    while True:
        batch = next(batches, None)
        more = torch.tensor(float(batch is not None), device=device)
        dist.all_reduce(more, dist.ReduceOp.MAX)
        if not more:
            return
        last = last if batch is None else batch
        yield last.to(device, non_blocking=True), batch is not None


def _evaluation(total_3: Tensor) -> Evaluation:
    nats, tokens, size = total_3.tolist()
    return Evaluation(
        nats_per_token=nats / tokens if tokens else math.nan,
        bits_per_byte=nats / math.log(2) / size if size else math.nan,
        tokens=int(tokens),
        bytes=int(size),
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without gradients, and with ``model`` as it is when it is used; afterwards each of its modules is as before."""
    with evaluating(model), torch.no_grad():
        yield
