"""Weight-only quantisation: linear layers and expert pools in int8 or int4, computed as they are stored.

    quantize(model, "int4", group=32)      # in place; routers, norms and embeddings stay as they are
    dequantize(model)                      # plain layers again, with the weights that counted

A quantised layer computes with int8 activations (32 share a scale) where the compiled kernels run, and with floating-point ones in
plain torch. Neither learns: gradients flow to inputs in torch alone, and weights are buffers.
"""
# Shapes: N rows (outputs), K depth (inputs), E experts, C rows of activations, D width, F hidden, R routed rows

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.nn.expert_call import WeightOn
from anabranch.nn.expert_layers import ExpertLayers
from anabranch.nn.expert_loop import experts_in_turn
from anabranch.nn.kernels import packed as native
from anabranch.nn.kernels.operands import is_transformed
from anabranch.nn.linear import Dense
from anabranch.nn.packed import SHARE, Packed
from anabranch.nn.parts import Matrices, form_of
from anabranch.nn.pool import ExpertPool
from anabranch.nn.remade import linear_remade
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import combine, dispatch, plan_dispatch

__all__ = [
    "FewBitLinear",
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
# Of experts, by their numbers.
Biases = Tensor | Mapping[int, Tensor]
AnyMatrices = TypeVar("AnyMatrices", bound=Matrices)

# Rows of a matrix that is worth it.
FEWEST = 16


class FewBitLinear(nn.Module):
    """y = x W^T + b with W in few bits, whatever they are, in place of an ``nn.Linear``. It does not learn."""

    bias: Tensor | None

    @property
    def in_features(self) -> int:
        """K."""
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        """N."""
        raise NotImplementedError

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """weight_NK as it counts."""
        raise NotImplementedError

    def numbers(self) -> tuple[Tensor, Tensor | None]:
        """(weight_NK, bias_N) as they count, in float32."""
        return self.weight_in(torch.float32), self.bias


class QuantizedLinear(FewBitLinear):
    """y = x W^T + b with W in int8 or int4, in place of an ``nn.Linear``."""

    def __init__(self, packed: Packed, bias_N: Tensor | None = None) -> None:
        super().__init__()
        self._like = _sizes_of(packed)
        self.register_buffer("data", packed.data)
        self.register_buffer("bias", None if bias_N is None else bias_N.detach().clone())
        # The weights as torch's own kernels want them, made when first needed.
        self._torch: tuple[Tensor, ...] | None = None

    data: Tensor

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

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """See `FewBitLinear`."""
        return self.packed.unpack(dtype)[0]

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
        known = packed.kind == "int4" or (packed.kind == "int8" and packed.group == packed.depth)
        on_cpu = x_CK.device.type == "cpu" and x_CK.dtype in (torch.float32, torch.bfloat16) and packed.rows % 16 == 0
        is_differentiated = native.learns(x_CK, self.bias) or is_transformed()
        if not on_cpu or not known or is_differentiated:
            return linear_remade(x_CK, packed.weight_in, self.bias)
        if self._torch is None or self._torch[1].dtype != x_CK.dtype:
            self._torch = _torch_form(packed, x_CK.dtype)
        weight, scale = self._torch
        if packed.kind == "int4":
            y_CN = torch._weight_int4pack_mm_for_cpu(x_CK.contiguous(), weight, packed.group, scale)
        else:
            y_CN = torch._weight_int8pack_mm(x_CK.contiguous(), weight, scale)
        return y_CN if self.bias is None else y_CN + self.bias.to(y_CN.dtype)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        like = self._like
        return f"in_features={like.depth}, out_features={like.rows}, kind={like.kind}, group={like.group}"


class PackedEmbedding(nn.Module):
    """An embedding whose table is a packed matrix, which a product reads too: for inference.

    Args:
        packed: the table.
        dtype: of what it gives; None for that of a table in floating point.
    """

    def __init__(self, packed: Packed, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._like = _sizes_of(packed)
        self._dtype = dtype or (torch.bfloat16 if packed.kind == "bfloat16" else torch.float32)
        self.register_buffer("data", packed.data)

    data: Tensor

    @property
    def packed(self) -> Packed:
        """The table."""
        return self._like.with_data(self.data)

    @property
    def weight(self) -> Tensor:
        """Nothing, of the type of vectors and on the device of the table: what is asked of it beside numbers."""
        return torch.empty(0, self._like.depth, dtype=self._dtype, device=self.data.device)

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
        return rows.to(self._dtype).view(*index.shape, self._like.depth)


def _sizes_of(packed: AnyMatrices) -> AnyMatrices:
    """The matrices without their weights: who holds them alone can let them go."""
    return packed.with_data(packed.data.to("meta"))  # type: ignore[return-value]


def _torch_form(packed: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weights, scales) of torch's kernels: int4 is w = s (u - 8) + z, with (s, z) as ``[G, N, 2]``."""
    number, scale, least = (part[0] for part in packed.integers())
    if packed.kind == "int8":
        return (number.to(torch.int16) - 128).to(torch.int8), scale[:, 0].to(dtype)
    zero = least.float() + 8 * scale.float()
    sides = torch.stack((scale.float().t(), zero.t()), dim=-1).to(dtype).contiguous()
    return torch._convert_weight_to_int4pack_for_cpu(number.int(), 1), sides


class QuantizedPool(nn.Module):
    """Experts in few bits, in place of an `ExpertPool`: the same forward.

    Args:
        w13, w2: gate rows, then up rows; the down projection.
        b13_EZ, b2_ED: biases behind both; None without any.
        activation: a name of `anabranch.nn.activation`.

    Attributes:
        layers: what experts have beside their matrices, as of an `ExpertPool`; None if there is nothing.
    """

    def __init__(
        self,
        w13: Matrices,
        w2: Matrices,
        b13_EZ: Tensor | None = None,
        b2_ED: Tensor | None = None,
        activation: str = "swiglu",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("b13", b13_EZ)
        self.register_buffer("b2", b2_ED)
        self._like = _sizes_of(w13), _sizes_of(w2)
        self.register_buffer("data13", w13.data)
        self.register_buffer("data2", w2.data)
        self.layers: ExpertLayers | None = None

    data13: Tensor
    data2: Tensor
    b13: Tensor | None
    b2: Tensor | None

    @classmethod
    def of(cls, pool: ExpertPool, bits: Bits, *, group: int | None = None, symmetric: bool = False) -> "QuantizedPool":
        """Round the matrices of a pool; its biases and its activation stay as they are.

        Raises ConfigError for experts with linears of their own or in other processes, and as `Packed.pack`.
        """
        if pool.layers is not None or pool.exchange is not None:
            what = "have linears of their own" if pool.layers is not None else "are in other processes too"
            raise ConfigError(
                f"stacked matrices of one process are rounded, and these experts {what}; leave them in floating point"
            )
        w13, w2 = (Packed.pack(weight, bits, group=group, symmetric=symmetric) for weight in pool.stacks)
        b13, b2 = (None if bias is None else bias.detach().clone() for bias in (pool.b13, pool.b2))
        return cls(w13, w2, b13, b2, activation=pool.activation)

    @property
    def packed(self) -> tuple[Matrices, Matrices]:
        """(w13, w2): gate rows, then up rows; the down projection."""
        return self._like[0].with_data(self.data13), self._like[1].with_data(self.data2)

    @property
    def is_plain(self) -> bool:
        """As of an `ExpertPool`."""
        return self.layers is None and self.b13 is None and self.activation == "swiglu"

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
        if self.layers is not None:
            made: Tensor = self.layers(x_ND, routing, w13, w2, weight_on=weight_on, context=context)
            return made
        plan = plan_dispatch(routing)
        rows_RD = dispatch(x_ND, plan, routing.weight_NK if weight_on == "input" else None)
        y_RD = packed_experts(
            w13, w2, rows_RD, plan.offset_E.tolist(), b13_EZ=self.b13, b2_ED=self.b2, activation=self.activation
        )
        return combine(y_RD, plan, None if weight_on == "input" else routing.weight_NK)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        kinds = ", ".join(
            f"{name}={' and '.join(kind for _, kind, _ in form_of(like))}"
            for name, like in zip(("w13", "w2"), self._like, strict=True)
        )
        return f"num_experts={self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, {kinds}"


def packed_experts(
    w13: Matrices,
    w2: Matrices,
    rows_RD: Tensor,
    offset_E: list[int],
    *,
    b13_EZ: Biases | None = None,
    b2_ED: Biases | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """y_RD: experts of packed matrices, see `experts_in_turn`. Biases may be those of experts with rows alone, by number."""
    first, second = (
        partial(_times_packed, packed, bias) for packed, bias in zip((w13, w2), (b13_EZ, b2_ED), strict=True)
    )
    return experts_in_turn(first, second, rows_RD, offset_E, activation=activation)


def _times_packed(packed: Matrices, bias_EN: Biases | None, expert: int, x_RK: Tensor) -> Tensor:
    return packed.expert(expert).linear(x_RK, None if bias_EN is None else bias_EN[expert])


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
        if isinstance(module, FewBitLinear):
            if name == "head" and getattr(getattr(model, "config", None), "tie_embeddings", False):
                setattr(model, name, None)
                continue
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight = nn.Parameter(module.weight_in(dtype))
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.to(dtype))
            replace(model, name, plain)
        elif isinstance(module, QuantizedPool):
            pool = ExpertPool(
                module.num_experts,
                module.dim,
                module.hidden_dim,
                activation=module.activation,
                bias=module.b13 is not None,
                device="meta",
            )
            pool.w13, pool.w2 = (nn.Parameter(packed.unpack(dtype)) for packed in module.packed)
            if module.b13 is not None and module.b2 is not None:
                pool.b13, pool.b2 = nn.Parameter(module.b13.to(dtype)), nn.Parameter(module.b2.to(dtype))
            pool.layers = module.layers
            replace(model, name, pool)
        elif isinstance(module, PackedEmbedding):
            replace(model, name, nn.Embedding.from_pretrained(module.packed.unpack(dtype)[0], freeze=False))


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
