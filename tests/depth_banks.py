"""Depth routers that are told what to decide, or decide by what they see."""

from typing import ClassVar

import torch


class Scripted:
    """Decides as ``decisions_BN`` say, by the place in the batch; keeps what it was shown."""

    def __init__(self, decisions_BN):
        self.decisions_BN, self.shown = torch.tensor(decisions_BN), []

    def decide(self, layer, x_BLD, mask_BL, control):
        self.shown.append((layer, x_BLD.clone(), mask_BL.clone(), control))
        decision_B = self.decisions_BN[: len(x_BLD), layer]
        return decision_B, torch.nn.functional.one_hot(decision_B, 3).float()


class ByState:
    """Decides by what it sees of a sequence, padding not: whoever is with it in the batch must not matter."""

    def decide(self, layer, x_BLD, mask_BL, control):
        sum_B = (x_BLD.double() * mask_BL[..., None]).sum((1, 2))
        # Far from rounding, yet different for almost any two sequences.
        decision_B = (sum_B * 3).round().long() % 3
        return decision_B, torch.nn.functional.one_hot(decision_B, 3).float()


class ByControl(ByState):
    """What a control says at its ends; in between what it sees."""

    ENDS: ClassVar = {-1.0: 0, 0.5: 1, 1.0: 2}

    def decide(self, layer, x_BLD, mask_BL, control):
        decision_B, probability_B3 = super().decide(layer, x_BLD, mask_BL, control)
        end = self.ENDS.get(control)
        return decision_B if end is None else torch.full_like(decision_B, end), probability_B3


def saved_bank(folder, model, seed=0, scale=1.0):
    """Folder of a `RouterBank` of random numbers, of ``model``, times ``scale``: the larger, the surer are decisions."""
    from anabranch.depth import stack_of
    from anabranch.depth.dr_llm.bank import BankConfig, RouterBank

    stack = stack_of(model)
    config = BankConfig(num_blocks=stack.num_blocks, width=stack.width, fingerprint=stack.fingerprint())
    bank = RouterBank(config, seed=seed).requires_grad_(False)
    for parameter in bank.parameters():
        parameter.mul_(scale)
    bank.save(folder)
    return str(folder)
