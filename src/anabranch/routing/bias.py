"""Balance without a loss: a bias per destination, used to select only, moved after each step by the load it saw.

"Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", Wang et al., arXiv 2408.15664 (rules, u, where gates come
from); DeepSeek-V3, arXiv 2412.19437 (freezing); "A Theoretical Framework for Auxiliary-Loss-Free Load Balancing", Han and Zhong,
arXiv 2512.03915, reads the update as one subgradient step on the dual of a balanced assignment, which is where the decaying rules
come from. How far a router is from that assignment: `anabranch.routing.assignment`.
"""
# Shapes: N items, E destinations, K choices per item, X bins of a histogram

import sys
from collections import deque
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.config import Field, configclass
from anabranch.errors import AnabranchError, CheckpointError, ConfigError
from anabranch.routing.balance import Balancer, LoadCounter, Observation
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import count_destinations
from anabranch.routing.measure import idle_fraction, max_violation
from anabranch.routing.router import Router

# u of each rule where none is given. Signs: the paper's. The others step in shares of the mean load, and what balances them is the
# density of the scores at the threshold, about 10 for sigmoid scores: 1/10 is near a Newton step (measured, see studies/alf_lb.py).
RATES = {"sign": 1e-3, "magnitude": 1e-3, "inv_n": 0.1, "inv_sqrt": 0.1, "quantile": 1.0}
# Of the factors of scores that a bias multiplies.
LEAST_FACTOR = 0.01
# How far a bias has to go: with u = 1e-3 a small model was balanced after 400 steps and not after 200 (docs/systems/alf-lb.md).
SPREAD = 0.3
# Bins of a histogram over margins in [-1, 1]. Their edges are cubes, so that they are finest at 0.
BINS = 1024


class BiasBalancer(LoadCounter, kind="bias"):
    """b_e += u_n sign(L - A_e), or a smoother rule, after each finished step; never used for the gates, never by a gradient.

    A_e are the items sent to e in the finished step (all micro-batches, all ranks), L their mean over the destinations that were open in
    it; a destination that was closed all step keeps its bias. ``center`` then takes the mean out, which changes no selection but
    keeps the bias from drifting.

        sign        u sign(L - A_e)                  the paper's; needs about (spread of the scores) / u steps to balance
        magnitude   u (L - A_e) / L                  a subgradient step on the dual
        inv_n       u / n (L - A_e) / L              n the step: regret O(log n) where the dual is strongly convex
        inv_sqrt    u / sqrt(n) (L - A_e) / L        regret O(sqrt n)
        quantile    to where e gets its share L of the step's items, others as they are (quantile balancing): no step size

    ``form`` says what the bias does to a score s: ``add`` selects by s + b_e; ``multiply`` by s f_e, where the factor f_e = 1 + b_e takes
    the steps of b_e (the paper's other form, slightly worse there). Factors stay above 0; ``center`` divides them by their mean.

    ``quantile`` needs a selection of fixed K (`TopK`), and scores with |score + bias - threshold| mostly below 1, as sigmoid and
    softmax have them.
    """

    @configclass
    class Config(Balancer.Config):
        """The controller's settings.

        Attributes:
            rule: see the class; ``sign`` is what practice uses. For short runs ``inv_n`` or ``quantile`` balance sooner.
            rate: u, meant for scores between 0 and 1. Default: 1e-3 for ``sign`` and ``magnitude``, 0.1 for ``inv_n`` and
                ``inv_sqrt``, 1 for ``quantile`` (the share of the way that one step goes).
            center: subtract the mean bias after each update.
            freeze_after: fraction of training after which the bias stays (DeepSeek-V3 freezes it for the last 3%).
            clip: largest absolute bias, None for no limit.
            form: ``add`` or ``multiply``, see the class. Scores to be multiplied must not be negative.
            history: remember what the last so many steps did, see `export_history`.
        """

        rule: Literal["sign", "magnitude", "inv_n", "inv_sqrt", "quantile"] = "sign"
        rate: float | None = Field(default=None, gt=0)
        center: bool = True
        freeze_after: float | None = Field(default=None, ge=0, le=1)
        clip: float | None = Field(default=None, gt=0)
        history: int = Field(default=0, ge=0)
        form: Literal["add", "multiply"] = "add"

        def __post_init__(self) -> None:
            if self.form == "multiply" and self.rule == "quantile":
                raise ConfigError("form is 'multiply' and rule 'quantile', whose quantiles are of sums; use form 'add'")

        def advice(self, steps: int) -> tuple[str, str] | None:
            """A sign that moves the bias by u a step goes no further than u times the steps."""
            reach = (RATES["sign"] if self.rate is None else self.rate) * steps
            if self.rule != "sign" or reach >= SPREAD:
                return None
            why = f"{steps} steps of signs move a bias by {reach:.2g} at most, and it may have to go {SPREAD}"
            return why, "rule=quantile" if self.form == "add" else "rule=inv_n"

    config: Config
    expert_bias: Tensor
    open_E: Tensor

    def __init__(self, config: Config, num_destinations: int) -> None:
        super().__init__(config, num_destinations)
        self.rate: float = RATES[config.rule] if config.rate is None else config.rate
        self.register_buffer("expert_bias", torch.zeros(num_destinations))
        self.register_buffer("open_E", torch.zeros(num_destinations), persistent=False)
        self.margins = _Margins(num_destinations) if config.rule == "quantile" else None
        self.past: deque[tuple[int, np.ndarray, np.ndarray]] = deque(maxlen=config.history)

    @property
    def bias_E(self) -> Tensor | None:
        """The bias, fp32 ``[E]``; None where it multiplies."""
        return self.expert_bias if self.config.form == "add" else None

    @property
    def shifts_by_scores(self) -> bool:
        """Where it multiplies."""
        return self.config.form == "multiply"

    def shift(self, score_NE: Tensor) -> Tensor:
        """b, or with ``multiply`` s f - s."""
        return self.expert_bias if self.config.form == "add" else score_NE.detach() * self.expert_bias

    def forward(self, seen: Observation, context: RoutingContext) -> None:
        """Emit the load of this forward pass."""
        open_E = None if seen.open_NE is None else seen.openness_E(context.item_mask_N)
        context.emit_load(self, seen.routing.load_E(), open_E)
        if self.margins is not None and seen.routing.num_choices < self.num_destinations:
            context.emit_load(self.margins, self.margins.histogram_EX(seen, self.expert_bias, context.item_mask_N))

    def counts(self) -> list[Tensor]:
        """Loads, and how often each destination was open."""
        return [self.load_E, self.open_E]

    def add_load(self, load_E: Tensor, open_E: Tensor | None = None) -> None:
        """Take the load of one forward pass, and which destinations were open in it (None: all)."""
        super().add_load(load_E)
        self.open_E += 1.0 if open_E is None else open_E

    def forget(self) -> None:
        """Set the counters to zero."""
        super().forget()
        if self.margins is not None:
            self.margins.forget()

    @torch.no_grad()
    def on_step(self, step: int, fraction: float) -> None:
        """Move the bias by the finished step's load, then forget the load.

        Args:
            step: steps finished, so 1 after the first; n of the decaying rules.
            fraction: of training, see ``freeze_after``.

        Raises AnabranchError if a module's forward is under way: a bias moved by the loads of the items it is about to select for
        would look into the future.
        """
        if self.load_E.sum() > 0:
            if _inside_forward():
                raise AnabranchError(
                    "the bias was to be updated inside a forward pass, by loads of items that are still being routed; call on_step "
                    "after the optimizer's step"
                )
            if self.past.maxlen:
                self.past.append((step, self.load_E.cpu().numpy().copy(), self.expert_bias.cpu().numpy().copy()))
            if self.config.freeze_after is None or fraction <= self.config.freeze_after:
                self._move(max(step, 1))
        super().on_step(step, fraction)

    def _move(self, step: int) -> None:
        was_open_E = self.open_E > 0
        mean = self.load_E.sum() / was_open_E.sum()
        if self.margins is not None:
            self.expert_bias -= self.rate * torch.where(was_open_E, self.margins.quantile_E(mean), 0.0)
        else:
            missing_E = torch.where(was_open_E, mean - self.load_E, 0.0)
            move_E = missing_E.sign() if self.config.rule == "sign" else missing_E / mean
            self.expert_bias += self.rate * _DECAY.get(self.config.rule, _no_decay)(step) * move_E
        if self.config.form == "multiply":
            self.expert_bias.clamp_(min=LEAST_FACTOR - 1)
        if self.config.center and self.config.form == "multiply":
            factor_E = self.expert_bias + 1
            self.expert_bias.copy_(factor_E / factor_E.mean() - 1)
        elif self.config.center:
            self.expert_bias -= self.expert_bias.mean()
        if self.config.clip is not None:
            self.expert_bias.clamp_(-self.config.clip, self.config.clip)


class _Margins(LoadCounter):
    """Counts, for every destination, how far items' selection values stand above the threshold between chosen and not.

    Item i's threshold alpha_i is its (K+1)-th largest ``score + bias``; destination e gets the items whose margin
    ``score_ie + b_e - alpha_i`` is positive. Lowering b_e by the (1 - L/N)-quantile of its margins would give it L items if no
    threshold moved.
    """

    count_EX: Tensor

    def __init__(self, num_destinations: int) -> None:
        super().__init__(Balancer.Config(), num_destinations)
        self.register_buffer("count_EX", torch.zeros(num_destinations, BINS), persistent=False)

    def counts(self) -> list[Tensor]:
        """The histogram, flat; ranks add theirs up."""
        return [self.count_EX.view(-1)]

    def add_load(self, load_E: Tensor, open_E: Tensor | None = None) -> None:
        """Take the histogram of one forward pass."""
        self.count_EX += load_E

    def histogram_EX(self, seen: Observation, bias_E: Tensor, item_mask_N: Tensor | None) -> Tensor:
        """int64 ``[E, X]``, items by destination and margin; closed destinations and padding are left out."""
        value_NE = seen.routing.score_NE.detach() + bias_E
        if seen.open_NE is not None:
            value_NE = value_NE.masked_fill(~seen.open_NE, -torch.inf)
        threshold_N1 = value_NE.topk(seen.routing.num_choices + 1, -1).values[:, -1:]
        counts_NE = torch.isfinite(value_NE) & torch.isfinite(threshold_N1)
        if item_mask_N is not None:
            counts_NE = counts_NE & item_mask_N.unsqueeze(-1)
        margin_NE = torch.where(counts_NE, value_NE - threshold_N1, 0.0)
        root_NE = margin_NE.sign() * margin_NE.abs().pow(1 / 3)
        bin_NE = ((root_NE + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
        first_E = torch.arange(self.num_destinations, device=bin_NE.device) * BINS
        flat_NE = torch.where(counts_NE, bin_NE + first_E, -1)
        return count_destinations(flat_NE, self.num_destinations * BINS).view(-1, BINS)

    def quantile_E(self, mean_load: Tensor) -> Tensor:
        """The margin above which ``mean_load`` items of each destination stand; 0 for one that no item could have chosen."""
        # Items in this bin or a higher one.
        above_EX = self.count_EX.flip(-1).cumsum(-1).flip(-1)
        total_E = above_EX[:, 0]
        wanted_E1 = torch.minimum(mean_load, total_E).unsqueeze(-1)
        bin_E1 = ((above_EX >= wanted_E1).sum(-1, keepdim=True) - 1).clamp_min(0)
        inside_E1 = self.count_EX.gather(-1, bin_E1).clamp_min(1)
        part_E1 = ((above_EX.gather(-1, bin_E1) - wanted_E1) / inside_E1).clamp(0, 1)
        root_E = ((bin_E1 + part_E1) * (2 / BINS) - 1).squeeze(-1)
        return torch.where(total_E > 0, root_E**3, 0.0)


def _no_decay(step: int) -> float:
    return 1.0


_DECAY = {"inv_n": lambda step: 1 / step, "inv_sqrt": lambda step: step**-0.5}
_CALL = nn.Module._call_impl.__code__


def _inside_forward() -> bool:
    """Whether a module is being called, seen from the stack: once per step that costs nothing, and no state can go stale."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def export_history(model: nn.Module) -> dict[str, dict[str, np.ndarray]]:
    """What the biases of ``model`` remember (``history``), by the name of the balancer, oldest step first.

    ``step`` ``[n]``; ``load`` and ``bias`` ``[n, E]`` (the bias that made that load); ``max_violation`` (MaxVio_batch) and
    ``idle_fraction`` ``[n]``. MaxVio_global is `anabranch.routing.measure.max_violation` of the loads of a
    validation set, which evaluation logs.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BiasBalancer) and module.past:
            step, load, bias = (np.array(values) for values in zip(*module.past, strict=True))
            found[name] = {
                "step": step,
                "load": load,
                "bias": bias,
                "max_violation": max_violation(load),
                "idle_fraction": idle_fraction(load),
            }
    return found


# Its name in folders of DeepSeek-V3 and of the many families that took its router.
CORRECTION_BIAS = "model.layers.{layer}.mlp.gate.e_score_correction_bias"


def export_correction_bias(model: nn.Module) -> dict[str, Tensor]:
    """The biases of ``model`` under the names of DeepSeek-V3: ``model.layers.{layer}.mlp.gate.e_score_correction_bias``, fp32.

    Raises CheckpointError if a layer has more than one (their format has room for one), or one that multiplies (theirs are added).
    """
    found: dict[str, Tensor] = {}
    for router, balancer in _biases(model):
        if balancer.bias_E is None:
            raise CheckpointError(
                f"the bias of layer {router.layer} multiplies scores; those of DeepSeek's format are added to them"
            )
        name = CORRECTION_BIAS.format(layer=router.layer)
        if name in found:
            raise CheckpointError(f"layer {router.layer} has more than one bias; DeepSeek's format has room for one")
        found[name] = balancer.expert_bias.detach().clone()
    return found


def import_correction_bias(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[int]:
    """Set the biases of ``model`` from DeepSeek-V3's tensors (others are ignored); the layers that were set.

    Raises CheckpointError for a layer that has no bias here, a bias of another length, or if there is none to read.
    """
    pairs = [(router, balancer) for router, balancer in _biases(model) if balancer.bias_E is not None]
    biases = {CORRECTION_BIAS.format(layer=router.layer): (router, balancer) for router, balancer in pairs}
    given = {name: value for name, value in tensors.items() if name.endswith(".e_score_correction_bias")}
    if not given:
        raise CheckpointError("no tensor is named *.e_score_correction_bias, so there is no bias to read")
    for name, value in given.items():
        if name not in biases:
            raise CheckpointError(f"{name} has no place here; layers with a bias that is added: {_layers(biases)}")
        length = biases[name][1].num_destinations
        if tuple(value.shape) != (length,):
            raise CheckpointError(f"{name} has shape {tuple(value.shape)}; the layer has {length} destinations")
    for name, value in given.items():
        with torch.no_grad():
            biases[name][1].expert_bias.copy_(value)
    return sorted(biases[name][0].layer for name in given)


def _biases(model: nn.Module) -> list[tuple[Router, BiasBalancer]]:
    routers = [module for module in model.modules() if isinstance(module, Router)]
    return [(router, part) for router in routers for part in router.balance if isinstance(part, BiasBalancer)]


def _layers(biases: Mapping[str, tuple[Router, BiasBalancer]]) -> str:
    return ", ".join(str(router.layer) for router, _ in biases.values()) or "none"
