"""The routers of a model: one for each block, which looks at the prompt before the block and says skip, run, or run twice.

    r_l = Linear(D, 128) -> GELU(tanh) -> Linear(128, 3)
    z_l = mean over windows w of r_l(m_w);  p_l = softmax(z_l);  decision = argmax

m_w are the means of `anabranch.depth.dr_llm.windows`. A bank is saved as a folder: ``routers.safetensors`` and ``config.json``, which says
of which model it is.
"""
# Shapes: B sequences, L positions of tokens, D width, W windows, F width of a router, C decisions, N blocks

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.config import Config, Field, Size, configclass, from_dict, to_dict
from anabranch.depth.dr_llm.control import controlled
from anabranch.depth.dr_llm.labels import CHOICES
from anabranch.depth.dr_llm.windows import plain_windows, pool_windows
from anabranch.depth.routed import PLAIN
from anabranch.errors import CheckpointError, ConfigError, NotFiniteError
from anabranch.files import atomic_folder, atomic_write_json, read_json
from anabranch.lm.shards import write_file
from anabranch.lm.tensors import SafetensorsFiles

if TYPE_CHECKING:
    from anabranch.depth.stack import BlockStack

__all__ = ["BankConfig", "RouterBank", "is_bank"]

CONFIG, ROUTERS = "config.json", "routers.safetensors"
FORMAT, SCHEMA = "anabranch-depth-routers", 1
_REPLACED = r"config\.json|routers\.safetensors|report\.json"


@configclass
class BankConfig(Config):
    """Sizes of a bank.

    Attributes:
        num_blocks: of the model.
        width: of its residual stream, D.
        windows: W (8).
        hidden: F (128).
        features: what a router sees: states before its block (``previous``), or for all blocks those before the first one (``first``),
            which is a baseline.
        fingerprint: of the model, as its stack says it; empty for a bank of no certain model.
    """

    num_blocks: int = Field(ge=1, le=4096)
    width: Size
    windows: int = Field(default=8, ge=1, le=65_536)
    hidden: int = Field(default=128, ge=1, le=65_536)
    features: Literal["previous", "first"] = "previous"
    fingerprint: str = ""


class RouterBank(nn.Module):
    """See the module. Weights are Xavier-uniform from ``seed``, biases zero; all of it is float32.

    All blocks' routers are stacked, so that they can learn side by side.
    """

    def __init__(self, config: BankConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        for name, shape in _shapes(config).items():
            weight = torch.zeros(shape)
            if len(shape) == 3:
                for block in range(config.num_blocks):
                    nn.init.xavier_uniform_(weight[block], generator=generator)
            self.register_parameter(name, nn.Parameter(weight))

    first_NFD: nn.Parameter
    first_bias_NF: nn.Parameter
    second_NCF: nn.Parameter
    second_bias_NC: nn.Parameter

    @property
    def num_blocks(self) -> int:
        """Of the model."""
        return self.config.num_blocks

    @property
    def width(self) -> int:
        """D."""
        return self.config.width

    @property
    def windows(self) -> int:
        """W."""
        return self.config.windows

    @property
    def num_parameters(self) -> int:
        """L (F (D + 1) + 3 (F + 1))."""
        return sum(parameter.numel() for parameter in self.parameters())

    def logits(self, mean_NBWD: Tensor, weight_BW: Tensor, blocks: slice = slice(None)) -> Tensor:
        """logit_NBC of the routers ``blocks``, each of which sees windows of its own.

        Args:
            mean_NBWD: float32.
            weight_BW: 1 / W' for a window that is there.
            blocks: whose these are; all by default.
        """
        num, batch, windows, width = mean_NBWD.shape
        flat_NXD = mean_NBWD.reshape(num, batch * windows, width)
        hidden_NXF = torch.baddbmm(
            self.first_bias_NF[blocks].unsqueeze(1), flat_NXD, self.first_NFD[blocks].transpose(1, 2)
        )
        made_NXC = torch.baddbmm(
            self.second_bias_NC[blocks].unsqueeze(1),
            F.gelu(hidden_NXF, approximate="tanh"),
            self.second_NCF[blocks].transpose(1, 2),
        )
        made_NBWC = made_NXC.view(num, batch, windows, CHOICES)
        return (made_NBWC * weight_BW[None, :, :, None]).sum(2)

    @torch.no_grad()
    def decide(
        self, layer: int, x_BLD: Tensor, mask_BL: Tensor | None = None, control: float = PLAIN
    ) -> tuple[Tensor, Tensor]:
        """(decision_B int64, probability_BC float32) of block ``layer`` for each sequence.

        Args:
            layer: the block that is to be decided on.
            x_BLD: states of the prompt before it; one token where decisions are made anew for each.
            mask_BL: False at padding; None for none.
            control: the knob, see `anabranch.depth.dr_llm.control`.

        Raises ConfigError for a block that there is not, states of another width, a control outside -1 to 1, or a bank that sees the
        states before the first block and is asked of another; NotFiniteError where states are NaN.
        """
        if not 0 <= layer < self.num_blocks:
            raise ConfigError(f"block {layer} has no router; the bank has routers of blocks 0 to {self.num_blocks - 1}")
        if x_BLD.shape[-1] != self.width:
            raise ConfigError(f"the states have width {x_BLD.shape[-1]}, and the routers are for width {self.width}")
        if self.config.features == "first" and layer:
            raise ConfigError(
                f"these routers see the states before the first block alone, and block {layer} is to be decided on: they are a baseline, "
                "which anabranch.depth.dr_llm.decide_prompts runs"
            )
        if x_BLD.shape[1] and (mask_BL is None or bool(mask_BL.all())):
            # Nearly always: one sequence, or equally long ones. A router is to take no time that counts.
            return self._decided(layer, self._seen(layer, plain_windows(x_BLD, self.windows)).mean(1), control)
        return self.decide_on(layer, *pool_windows(x_BLD, mask_BL, self.windows), control)

    @torch.no_grad()
    def decide_on(
        self, layer: int, mean_BWD: Tensor, weight_BW: Tensor, control: float = PLAIN
    ) -> tuple[Tensor, Tensor]:
        """`decide` of pooled states, see `pool_windows`."""
        return self._decided(layer, (self._seen(layer, mean_BWD) * weight_BW.unsqueeze(-1)).sum(1), control)

    def _seen(self, layer: int, mean_BWD: Tensor) -> Tensor:
        """logit_BWC of one router for each window."""
        hidden_BWF = F.linear(mean_BWD, self.first_NFD[layer], self.first_bias_NF[layer])
        return F.linear(F.gelu(hidden_BWF, approximate="tanh"), self.second_NCF[layer], self.second_bias_NC[layer])

    def _decided(self, layer: int, logit_BC: Tensor, control: float) -> tuple[Tensor, Tensor]:
        if not bool(torch.isfinite(logit_BC).all()):
            raise NotFiniteError(
                f"what goes into block {layer} is NaN or infinite, so its router cannot decide; check the model"
            )
        probability_BC = controlled(logit_BC.softmax(-1), control)
        return probability_BC.argmax(-1), probability_BC

    def save(self, folder: str | Path, *, report: dict[str, Any] | None = None) -> None:
        """Write the bank, all or nothing; one that lies there is replaced.

        Args:
            folder: not there, empty, or with a bank and nothing else.
            report: how it was trained; becomes ``report.json``.

        Raises DataError where the folder holds something else or cannot be written, CapacityError where the disk is full.
        """
        place = Path(folder)
        told = {"format": FORMAT, "schema": SCHEMA, **to_dict(self.config)}
        with atomic_folder(place, replacing=_REPLACED if is_bank(place) else "") as temporary:
            atomic_write_json(temporary / CONFIG, told)
            if report is not None:
                atomic_write_json(temporary / "report.json", report)
            # The windows stand beside the weights too: no shape tells of them, and with others routers would decide, but otherwise.
            write_file(
                temporary / ROUTERS,
                {name: value.detach().contiguous() for name, value in self.state_dict().items()}
                | {"windows": torch.tensor([self.windows])},
            )

    @classmethod
    def load(cls, folder: str | Path, stack: "BlockStack | None" = None, *, windows: int | None = None) -> Self:
        """The bank in ``folder``, in evaluation, on the device of ``stack``.

        Args:
            folder: as `save` wrote it.
            stack: the model that it is to be used with; None checks nothing of it.
            windows: W that is expected; None for any.

        Raises CheckpointError, which names both values, for a bank of another depth, width, number of windows or model; and for a folder
        that holds none or a damaged one.
        """
        place = Path(folder)
        if not is_bank(place):
            raise CheckpointError(f"no routers in {place} (looked for {CONFIG} of anabranch depth train)")
        table = read_json(place / CONFIG)
        if table.get("schema") != SCHEMA:
            raise CheckpointError(f"{place / CONFIG} has schema {table.get('schema')!r}; this version reads {SCHEMA}")
        try:
            config = from_dict(
                BankConfig, {name: value for name, value in table.items() if name not in ("format", "schema")}
            )
        except ConfigError as error:
            raise CheckpointError(f"{place / CONFIG} does not describe routers: {error}") from None
        files = SafetensorsFiles([place / ROUTERS])
        _check_fits(place, config, files, stack, windows)
        bank = cls(config)
        with torch.no_grad():
            for name, parameter in bank.named_parameters():
                parameter.copy_(files.read(name))
        if not all(bool(torch.isfinite(parameter).all()) for parameter in bank.parameters()):
            raise CheckpointError(f"{place / ROUTERS} holds NaN or infinite weights; train the routers again")
        bank.requires_grad_(False).eval()
        return bank if stack is None else bank.to(stack.device)


def _shapes(config: BankConfig) -> dict[str, tuple[int, ...]]:
    """Of the parameters."""
    blocks, hidden = config.num_blocks, config.hidden
    return {
        "first_NFD": (blocks, hidden, config.width),
        "first_bias_NF": (blocks, hidden),
        "second_NCF": (blocks, CHOICES, hidden),
        "second_bias_NC": (blocks, CHOICES),
    }


def is_bank(folder: str | Path) -> bool:
    """Whether ``folder`` holds routers."""
    place = Path(folder) / CONFIG
    if not place.is_file():
        return False
    try:
        return read_json(place).get("format") == FORMAT
    except CheckpointError:
        return False


def _check_fits(
    place: Path, config: BankConfig, files: SafetensorsFiles, stack: "BlockStack | None", windows: int | None
) -> None:
    """Raise CheckpointError where numbers and config do not go together, or are not those of the model."""
    for name, shape in (*_shapes(config).items(), ("windows", (1,))):
        stored = files.shape(name) if name in files.names else None
        if stored != shape:
            raise CheckpointError(
                f"{place / ROUTERS} has {'no ' + name if stored is None else f'{name} of shape {list(stored)}'}, and {CONFIG} asks for "
                f"{list(shape)}"
            )
    windows_1 = files.read("windows")
    if windows_1.dtype != torch.int64:
        raise CheckpointError(
            f"{place / ROUTERS} has windows of type {windows_1.dtype}; it must be a whole number, int64"
        )
    stored_windows = int(windows_1)
    wanted: list[tuple[str, Any, Any]] = [("windows (W)", stored_windows, config.windows)]
    if windows is not None:
        wanted.append(("windows (W)", config.windows, windows))
    if stack is not None:
        wanted += [("blocks (L)", config.num_blocks, stack.num_blocks), ("width (d)", config.width, stack.width)]
        if config.fingerprint:
            wanted.append(("fingerprint", config.fingerprint, stack.fingerprint()))
    for what, theirs, ours in wanted:
        if theirs != ours:
            raise CheckpointError(
                f"the routers in {place} are of another model or setting: {what} {theirs}, and here {ours}"
            )
