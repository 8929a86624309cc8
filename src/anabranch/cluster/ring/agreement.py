"""Whether all processes were given the same: asked once in a call, so that a difference is one message and not a wait without an end."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from anabranch.errors import InputError

__all__ = ["check_agreement"]


def check_agreement(values: Mapping[str, int], group: dist.ProcessGroup, problem: str | None = None) -> None:
    """Raise InputError on all ranks of ``group`` if one has another value than the others, or a ``problem`` of its own.

    Args:
        values: by name; every rank gives the same names.
        group: that calls this together.
        problem: what is wrong here already; the others learn that something is.
    """
    names = [*values, "problem"]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    mine_F = torch.tensor([*values.values(), int(problem is not None)], dtype=torch.int64, device=device)
    all_NF = [torch.empty_like(mine_F) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_NF, mine_F, group=group)
    if problem is not None:
        raise InputError(problem)
    table = torch.stack(all_NF).tolist()
    wrong = [rank for rank, row in enumerate(table) if row[-1]]
    if wrong:
        raise InputError(f"rank {wrong[0]} was given what it cannot work on; see its own message")
    for column, name in enumerate(names[:-1]):
        found = [row[column] for row in table]
        if len(set(found)) > 1:
            raise InputError(f"ranks were given different {name}: {found}; it must be the same on all")
