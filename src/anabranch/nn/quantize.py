"""Weight-only quantisation: linear layers and expert pools in int8 or int4, computed as they are stored.

    quantize(model, "int4", group=32)      # in place; routers, norms and embeddings stay as they are
    dequantize(model)                      # plain layers again, with the weights that counted

A quantised layer computes with int8 activations (32 share a scale) where the compiled kernels run, and with floating-point ones in
plain torch. Neither learns: gradients flow to inputs in torch alone, and weights are buffers.
"""
# Shapes: N rows (outputs), K depth (inputs), E experts, C rows of activations, D width, F hidden, R routed rows

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.nn.expert_call import WeightOn
from anabranch.nn.kernels import packed as native
from anabranch.nn.linear import Dense
from anabranch.nn.packed import SHARE, Packed
from anabranch.nn.pool import ExpertPool
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import combine, dispatch, plan_dispatch

__all__ = [
    "PackedEmbedding",
    "QuantizedLinear",
    "QuantizedPool",
    "check_bits",
    "dequantize",
    "module_of",
    "packed_experts",
    "put",
    "quantizable",
    "quantize",
    "replace",
]

Bits = Literal["int8", "int4"]

# Rows of a matrix that is worth it.
FEWEST = 16


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W in int8 or int4, in place of an ``nn.Linear``."""

    def __init__(self, packed: Packed, bias_N: Tensor | None = None) -> None:
        super().__init__()
        self._like = _sizes_of(packed)
        self.register_buffer("data", packed.data)
        self.register_buffer("bias", None if bias_N is None else bias_N.detach().clone())
        # The weights as torch's own kernels want them, made when first needed.
        self._torch: tuple[Tensor, ...] | None = None

    data: Tensor
    bias: Tensor | None

    @classmethod
    def of(
        cls, linear: nn.Linear, bits: Bits, *, group: int | None = None, symmetric: bool = False
    ) -> "QuantizedLinear":
        """Round a layer. Raises ConfigError as `Packed.pack`."""
        return cls(Packed.pack(linear.weight, bits, group=group, symmetric=symmetric), linear.bias)

    @property
    def packed(self) -> Packed:
        """The weights."""
        return self._like.with_data(self.data)

    @property
    def in_features(self) -> int:
        """K."""
        return self._like.depth

    @property
    def out_features(self) -> int:
        """N."""
        return self._like.rows

    def numbers(self) -> tuple[Tensor, Tensor | None]:
        """(weight_NK, bias_N) as they count, in float32."""
        return self.packed.unpack(torch.float32)[0], self.bias

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """``[..., K]`` to ``[..., N]`` in the dtype of ``x``."""
        x_CK = x.reshape(-1, x.shape[-1])
        packed = self.packed
        if native.can(packed, x_CK, self.bias):
            y_CN = native.linear(packed, x_CK, self.bias)
        else:
            y_CN = self._plain(packed, x_CK)
        return y_CN.view(*x.shape[:-1], self._like.rows)

    def _plain(self, packed: Packed, x_CK: Tensor) -> Tensor:
        """By torch's own kernels for packed weights on a CPU, where they know the format; else unpacked."""
        bias = None if self.bias is None else self.bias.to(x_CK.dtype)
        known = packed.kind == "int4" or (packed.kind == "int8" and packed.group == packed.depth)
        on_cpu = x_CK.device.type == "cpu" and x_CK.dtype in (torch.float32, torch.bfloat16) and packed.rows % 16 == 0
        if not on_cpu or not known or (torch.is_grad_enabled() and x_CK.requires_grad):
            return F.linear(x_CK, packed.unpack(x_CK.dtype)[0], bias)
        if self._torch is None or self._torch[1].dtype != x_CK.dtype:
            self._torch = _torch_form(packed, x_CK.dtype)
        weight, scale = self._torch
        if packed.kind == "int4":
            y_CN = torch._weight_int4pack_mm_for_cpu(x_CK.contiguous(), weight, packed.group, scale)
        else:
            y_CN = torch._weight_int8pack_mm(x_CK.contiguous(), weight, scale)
        return y_CN if bias is None else y_CN + bias

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        like = self._like
        return f"in_features={like.depth}, out_features={like.rows}, kind={like.kind}, group={like.group}"


class PackedEmbedding(nn.Module):
    """An embedding whose table is a packed matrix in float32 or bfloat16, which a product reads too: for inference."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self._like = _sizes_of(packed)
        self.register_buffer("data", packed.data)

    data: Tensor

    @property
    def packed(self) -> Packed:
        """The table."""
        return self._like.with_data(self.data)

    @property
    def weight(self) -> Tensor:
        """Nothing, of the type and on the device of the table: what is asked of it beside numbers."""
        dtype = torch.float32 if self._like.kind == "float32" else torch.bfloat16
        return torch.empty(0, self._like.depth, dtype=dtype, device=self.data.device)

    @property
    def num_embeddings(self) -> int:
        """Rows."""
        return self._like.rows

    @property
    def embedding_dim(self) -> int:
        """Columns."""
        return self._like.depth

    def forward(self, index: Tensor) -> Tensor:
        """``[..., D]`` of ``[...]``."""
        rows = self._like.with_data(self.data).rows_at(index.reshape(-1))
        return rows.view(*index.shape, self._like.depth)


def _sizes_of(packed: Packed) -> Packed:
    """The matrices without their weights: who holds them alone can let them go."""
    return packed.with_data(packed.data.to("meta"))


def _torch_form(packed: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weights, scales) of torch's kernels: int4 is w = s (u - 8) + z, with (s, z) as ``[G, N, 2]``."""
    number, scale, least = (part[0] for part in packed.integers())
    if packed.kind == "int8":
        return (number.to(torch.int16) - 128).to(torch.int8), scale[:, 0].to(dtype)
    zero = least.float() + 8 * scale.float()
    sides = torch.stack((scale.float().t(), zero.t()), dim=-1).to(dtype).contiguous()
    return torch._convert_weight_to_int4pack_for_cpu(number.int(), 1), sides


class QuantizedPool(nn.Module):
    """Experts in int8 or int4, in place of an `ExpertPool`: the same forward."""

    def __init__(self, w13: Packed, w2: Packed) -> None:
        super().__init__()
        self._like = _sizes_of(w13), _sizes_of(w2)
        self.register_buffer("data13", w13.data)
        self.register_buffer("data2", w2.data)

    data13: Tensor
    data2: Tensor

    @classmethod
    def of(cls, pool: ExpertPool, bits: Bits, *, group: int | None = None, symmetric: bool = False) -> "QuantizedPool":
        """Round a pool. Raises ConfigError as `Packed.pack`."""
        w13, w2 = (Packed.pack(weight, bits, group=group, symmetric=symmetric) for weight in pool.stacks)
        return cls(w13, w2)

    @property
    def packed(self) -> tuple[Packed, Packed]:
        """(w13, w2): gate rows, then up rows; the down projection."""
        return self._like[0].with_data(self.data13), self._like[1].with_data(self.data2)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.data13.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self._like[0].depth

    @property
    def hidden_dim(self) -> int:
        """F."""
        return self._like[1].depth

    def forward(
        self,
        x_ND: Tensor,
        routing: Routing,
        *,
        weight_on: WeightOn = "output",
        context: RoutingContext | None = None,
    ) -> Tensor:
        """y_ND: each item's experts, weighted and summed."""
        w13, w2 = self.packed
        plan = plan_dispatch(routing)
        rows_RD = dispatch(x_ND, plan, routing.weight_NK if weight_on == "input" else None)
        y_RD = packed_experts(w13, w2, rows_RD, plan.offset_E.tolist())
        return combine(y_RD, plan, None if weight_on == "input" else routing.weight_NK)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        kind, group = self._like[0].kind, self._like[0].group
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, kind={kind}, group={group}"
        )


def packed_experts(w13: Packed, w2: Packed, rows_RD: Tensor, offset_E: list[int]) -> Tensor:
    """y_RD: SwiGLUs of packed matrices, expert e on the rows that end at ``offset_E[e]``."""
    y_RD = torch.zeros_like(rows_RD)
    start = 0
    for expert, end in enumerate(offset_E):
        if end > start:
            gate, up = w13.expert(expert).linear(rows_RD[start:end]).chunk(2, dim=-1)
            y_RD[start:end] = w2.expert(expert).linear(F.silu(gate) * up)
        start = end
    return y_RD


@torch.no_grad()
def quantize(
    model: nn.Module,
    bits: Bits,
    *,
    group: int | None = None,
    symmetric: bool = False,
    head: Bits | None = "int8",
    skip: tuple[str, ...] = (),
) -> list[str]:
    """Replace linear layers and expert pools of ``model`` by quantised ones, in place; `anabranch.lm.save_model` keeps them so.

    What cannot be packed (inputs that are no multiple of 32, fewer than 16 outputs) and every other module stays, also pools whose experts
    are not plain SwiGLUs. A decoder whose head
    is its embedding gets a head of its own, and keeps the embedding.

    Args:
        model: a `Decoder`, or any module.
        bits: ``int8`` or ``int4``.
        group: weights that share a scale: 32, 64, 128, ...; None for 32 with int4 and one scale per row with int8. Layers whose inputs
            it does not divide get the largest part of it that does.
        symmetric: see `Packed.pack`.
        head: of the language model's head, whose errors show most; None leaves it.
        skip: beginnings of names that stay.

    Returns:
        The names of what was replaced.

    Raises:
        ConfigError: an unknown ``bits`` or a ``group`` that is no multiple of 32.
    """
    chosen = quantizable(model, bits, group=group, head=head, skip=skip)
    for name, (own, own_group) in chosen.items():
        module = module_of(model, name)
        kind: Any = QuantizedPool if isinstance(module, ExpertPool) else QuantizedLinear
        put(model, name, kind.of(module, own, group=own_group, symmetric=symmetric))
    return list(chosen)


def quantizable(
    model: nn.Module,
    bits: Bits,
    *,
    group: int | None = None,
    head: Bits | None = "int8",
    skip: tuple[str, ...] = (),
) -> dict[str, tuple[Bits, int | None]]:
    """(bits, group) of each module that `quantize` would replace; the arguments and errors are its. Only sizes are looked at."""
    check_bits(bits, group)
    found: dict[str, tuple[Bits, int | None]] = {}
    for name, module in model.named_modules():
        # A class made of a linear layer computes something of its own, which its matrix alone does not say.
        is_known = type(module) in (Dense, nn.Linear) or (isinstance(module, ExpertPool) and module.is_plain)
        if is_known and not any(name.startswith(part) for part in skip):
            _choose(found, name, module, (head, None) if name == "head" else (bits, group))
    if _is_tied(model) and "head" not in skip:
        _choose(found, "head", module_of(model, "head"), (head, None))
    return found


def _choose(
    found: dict[str, tuple[Bits, int | None]], name: str, module: Any, asked: tuple[Bits | None, int | None]
) -> None:
    """Add a module to ``found`` unless it cannot be quantised, or is not to be."""
    bits, group = asked
    depths = (module.in_features,) if isinstance(module, nn.Linear) else (module.dim, module.hidden_dim)
    is_small = isinstance(module, nn.Linear) and module.out_features < FEWEST
    if bits is None or is_small or any(depth % SHARE for depth in depths):
        return
    if group is None and bits == "int4":
        group = SHARE
    if group is not None:
        # A group wider than every depth is as wide as what they have in common: it is not counted down to.
        common = math.gcd(*depths)
        group = next(part for part in range(min(group, common), 0, -SHARE) if common % part == 0)
    found[name] = bits, group


def module_of(model: Any, name: str) -> Any:
    """The module ``name`` of a model; the head that is the embedding as a linear layer that shares its weight. None if there is none."""
    if name == "head" and _is_tied(model):
        embedding: Any = model.embedding
        table = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
        table.weight = embedding.weight
        return table
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def put(model: Any, name: str, made: nn.Module) -> None:
    """`replace` for a module that `module_of` gave."""
    if name == "head":
        model.head = made
    else:
        replace(model, name, made)


def check_bits(bits: str, group: int | None) -> None:
    """Raise ConfigError for ``bits`` and ``group`` that `quantize` does not take."""
    if bits not in ("int8", "int4"):
        raise ConfigError(f"quantize is {bits!r}; use 'int8' or 'int4'")
    if group is not None and (group < SHARE or group % SHARE):
        raise ConfigError(f"group is {group}; it must be a multiple of {SHARE}")


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Plain layers with the weights that counted, in place of quantised ones. A tied head becomes the embedding again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            if name == "head" and getattr(getattr(model, "config", None), "tie_embeddings", False):
                setattr(model, name, None)
                continue
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight = nn.Parameter(module.packed.unpack(dtype)[0])
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.to(dtype))
            replace(model, name, plain)
        elif isinstance(module, QuantizedPool):
            pool = ExpertPool(module.num_experts, module.dim, module.hidden_dim, device="meta")
            pool.w13, pool.w2 = (nn.Parameter(packed.unpack(dtype)) for packed in module.packed)
            replace(model, name, pool)


def _is_tied(model: nn.Module) -> bool:
    return isinstance(getattr(model, "embedding", None), nn.Embedding) and getattr(model, "head", 0) is None


def replace(model: nn.Module, name: str, made: nn.Module) -> None:
    """Set the module ``name``, wherever it stands, and every plain reference to it (a pool that layers share)."""
    old = model.get_submodule(name)
    for module in list(model.modules()):
        for leaf, part in list(module._modules.items()):
            if part is old:
                setattr(module, leaf, made)
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if value is old:
                object.__setattr__(module, key, made)
