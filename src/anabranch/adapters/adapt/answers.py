"""`Answers`: the likelihood of answers, token by token, and the batches that it takes: rows padded on the left, each with its answer."""
# Shapes: B rows, L positions, M tokens of answers, V vocabulary, R rows of several kinds

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.by_row import check_told, told_rows
from anabranch.lm.decoder import Decoder
from anabranch.nn.linear import takes_context

__all__ = ["IGNORED", "Answers", "Rows", "batch_of", "joined", "mean_of_rows"]

# (token_BL, start_B of answers, length_B, task_B), padded on the right.
Rows = tuple[Tensor, Tensor, Tensor, Tensor]

# The target of a position that is none of an answer.
IGNORED = -100


class Answers(nn.Module):
    """A decoder that is asked for the likelihood of answers alone: the head sees no other position.

    Args:
        decoder: the adapted model.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    @property
    def recompute(self) -> bool:
        """As of the decoder."""
        return self.decoder.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.decoder.recompute = value

    def forward(
        self,
        token_BL: Tensor,
        target_BL: Tensor,
        *,
        mask_BL: Tensor | None = None,
        state: Mapping[str, Any] | None = None,
        twice: bool = False,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
        """(nats_M, spread_M, losses that layers add, what they measure, apart_M) of the tokens of answers, row by row.

        Args:
            token_BL: int64 ids.
            target_BL: int64 ids of answers, one position early; -100 where there is none.
            mask_BL: bool, False for padding, which stands on the left.
            state: what layers are told of the rows, see `Method.state`.
            twice: the second half of the rows are those of the first again, which layers are told by ``state``; what is given back is of
                the first.

        ``spread_M`` is the mean over the vocabulary of -log p, for smoothed labels; ``apart_M`` the mean of the divergences of both halves
        from each other, 0 without.
        """
        decoder = self.decoder
        # A pass that is made of its parts asks what blocks around it tell its rows.
        check_told(decoder, len(token_BL), "a pass over answers")
        told = told_rows(decoder, range(len(token_BL)), token_BL.shape[1]) | dict(state or {})
        context = decoder.context(token_BL, token_mask_BL=mask_BL, state=told)
        x_BLD = decoder.hidden(token_BL, context)
        if decoder.streams is not None:
            x_BLD = decoder.streams.merge(x_BLD, context)
        is_asked_BL = target_BL != IGNORED
        if decoder.head is not None and takes_context(decoder.head):
            logits_MV = decoder.logits(x_BLD, context)[is_asked_BL]
        else:
            logits_MV = decoder.logits(x_BLD[is_asked_BL])
        context.commit()
        log_p_MV, target_M = logits_MV.float().log_softmax(-1), target_BL[is_asked_BL]
        apart_M = log_p_MV.new_zeros(())
        if twice:
            log_p_MV, other_MV = log_p_MV.chunk(2)
            target_M = target_M[: len(log_p_MV)]
            # KL one way and the other, halved.
            apart_M = ((log_p_MV.exp() - other_MV.exp()) * (log_p_MV - other_MV)).sum(-1) / 2
        nats_M = -log_p_MV.gather(1, target_M.unsqueeze(1)).squeeze(1)
        return nats_M, -log_p_MV.mean(-1), context.mean_losses(), context.mean_metrics(), apart_M


def batch_of(token_BL: Tensor, start_B: Tensor, length_B: Tensor, task_B: Tensor) -> dict[str, Any]:
    """What `Answers` is called with, of rows that are padded on the right: as long as the longest, padded on the left."""
    longest = int(length_B.max())
    place_BL = torch.arange(longest, device=token_BL.device) - (longest - length_B)[:, None]
    is_real_BL = place_BL >= 0
    id_BL = token_BL.long().gather(1, place_BL.clamp_min(0))
    target_BL = id_BL.masked_fill(place_BL < start_B[:, None], IGNORED)
    mask_BL = None if bool(is_real_BL.all()) else is_real_BL[:, :-1]
    return {"token_BL": id_BL[:, :-1], "target_BL": target_BL[:, 1:], "mask_BL": mask_BL, "task_B": task_B}


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of several kinds as one batch, padded on the right to the longest."""
    longest = max(part[0].shape[1] for part in parts)
    token_RL = torch.cat([F.pad(part[0].long(), (0, longest - part[0].shape[1])) for part in parts])
    _, starts, lengths, tasks = zip(*parts, strict=True)
    return token_RL, torch.cat(starts), torch.cat(lengths), torch.cat(tasks)


def mean_of_rows(value_M: Tensor, row_M: Tensor, rows: int) -> Tensor:
    """mean_B of the values of each row."""
    count_B = torch.bincount(row_M, minlength=rows).clamp_min(1)
    return value_M.new_zeros(rows).index_add(0, row_M, value_M) / count_B
