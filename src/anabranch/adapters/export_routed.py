"""`export_task`: what a routed adapter does for one task, or on average, as one plain LoRA that every server loads; and how near it is."""
# Shapes: B rows, L positions

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.adapters.attach import load_peft
from anabranch.adapters.graft import layers_of
from anabranch.adapters.mhr.few_shot import mu as average_of_skills
from anabranch.adapters.mhr.few_shot import to_single_lora
from anabranch.adapters.mixture_report import mixture_report
from anabranch.adapters.own_folder import described_in, read_own
from anabranch.adapters.peft_folder import Adapter, write_peft
from anabranch.adapters.put_on import take_off
from anabranch.adapters.routed import RoutedLowRank
from anabranch.adapters.static import mu as average_of_experts
from anabranch.adapters.static import static_mixture
from anabranch.adapters.tasks import task_names, task_rows
from anabranch.bounds import shown
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.generate import evaluating

__all__ = ["export_task"]


@torch.no_grad()
def export_task(
    out: str | Path,
    base: Decoder,
    folder: str | Path,
    task: str | None,
    *,
    is_average: bool,
    rows: Iterable[tuple[Tensor, Tensor | None]] | None = None,
) -> dict[str, float | str]:
    """Write the adapter of one task out of a folder of ours as plain LoRA, and hold it against what it is of.

    Args:
        out: the new folder of peft's.
        base: the model that the adapter is of; it is left with what was written.
        folder: as `write_own` wrote it.
        task: the task; None for the average of all skills, which ``is_average`` must say too.
        is_average: likewise.
        rows: (token_BL, mask_BL or None) of the task, for a mixture whose router chooses for each token (DynMoLE, LoRA-Mixer): its experts
            are weighed as these tokens weigh them on average. Such a mixture knows no task itself; None for the average of its experts.

    Returns the greatest difference of logits, and the greatest of them, over tokens drawn at random.

    Raises ConfigError where neither or both are given, the adapter is of another kind, or it routes by task and there are rows;
    InputError for a task that there is not; others as `read_own` and `write_peft`.
    """
    read_own(folder, base)
    if not any(getattr(module, "routes_by_task", False) for module in base.modules()):
        return _export_mixture(out, base, folder, task, is_average=is_average, rows=rows)
    names = task_names(base)
    if rows is not None:
        raise ConfigError(f"{folder} routes by task, so nothing is measured on rows; leave them out")
    if (task is None) != is_average:
        raise ConfigError(
            f"{folder} routes by task; name one of {shown(list(names))} with --task, or say --average, not both"
        )
    adapter = average_of_skills(base) if task is None else to_single_lora(base, task)
    adapter = adapter.of_base(described_in(folder)["base"])
    return {"task": task or "average", **_held_against(out, base, adapter, task_rows(base, [task, task], 16))}


def _export_mixture(
    out: str | Path,
    base: Decoder,
    folder: str | Path,
    task: str | None,
    *,
    is_average: bool,
    rows: Iterable[tuple[Tensor, Tensor | None]] | None,
) -> dict[str, float | str]:
    """An average of experts that a router chooses: no plain LoRA does what the router does, so it is only near the mixture."""
    layers = layers_of(base).values()
    if not layers or not all(isinstance(layer, RoutedLowRank) for layer in layers):
        raise ConfigError(
            f"{folder} has no tasks and no experts that could be exported; load it with anabranch eval --adapter"
        )
    if (task is None) != is_average or (task is None) != (rows is None):
        said = f"--task is {task!r}, but " if task is not None else ""
        raise ConfigError(
            f"{said}{folder} is a mixture whose router chooses experts for each token, which no plain LoRA does; --average writes the "
            "plain average of its experts, --task NAME --data ROWS their average as that task's rows use them"
        )
    if rows is None:
        adapter = average_of_experts(base)
    else:
        report = mixture_report(
            base, ((token_BL, mask_BL, torch.zeros(len(token_BL)).long()) for token_BL, mask_BL in rows)
        )
        adapter = static_mixture(base, report.weights_of(0))
    return {"task": task or "average", **_held_against(out, base, adapter.of_base(described_in(folder)["base"]), {})}


def _held_against(out: str | Path, base: Decoder, adapter: Adapter, state: dict[str, Any]) -> dict[str, float | str]:
    """Write ``adapter``, and tell how ``base`` with it differs from what it has on, which is taken off."""
    token_BL = torch.randint(base.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    token_BL = token_BL.to(base.embedding.weight.device)
    with evaluating(base):
        expected = base(token_BL, state={name: value.to(token_BL.device) for name, value in state.items()}).logits_BLV
        write_peft(out, adapter)
        load_peft(out, take_off(base))
        difference = (base(token_BL).logits_BLV - expected).float().abs().max()
    return {
        "difference": float(difference),
        "greatest_logit": float(expected.float().abs().max()),
    }
