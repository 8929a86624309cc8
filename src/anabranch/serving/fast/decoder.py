"""`FastDecoder`: a decoder's layers on the tokens of one step, in one call.

if FastDecoder.supports(model) is None:
    fast = FastDecoder(model, pool.key[:, 0], pool.value[:, 0], block_tokens=16)
    x_TD = fast.hidden(token_T, position_T, sequence_N4, table_U)
    logits_RV = fast.logits(x_TD[rows])
"""
# Shapes: A layers, S slots, G key heads, W head width, T tokens of a step, N sequences, U numbers of blocks, D width, K experts per token

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.machine import give_back_freed
from anabranch.nn.description import FeedForwardForm, Loops, Passes
from anabranch.nn.kernels import packed as native
from anabranch.nn.kernels.operands import address, array_address
from anabranch.nn.kernels.packed import Matrix
from anabranch.nn.linear import is_plain
from anabranch.nn.offloaded import OffloadedPool
from anabranch.nn.packed import SHARE, Packed
from anabranch.nn.parted import PartedLinear
from anabranch.nn.parts import Matrices
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import PackedEmbedding, QuantizedLinear, QuantizedPool, replace
from anabranch.routing.router import Router
from anabranch.serving.fast.adapters import AdapterTables, AdapterUses
from anabranch.serving.fast.heads import heads, plain_of
from anabranch.serving.fast.layout import (
    BYTES,
    EXPERTS,
    KIND_OF,
    STEP,
    CBlock,
    CExperts,
    CModel,
    CStep,
    check_sizes,
    floats,
)
from anabranch.serving.fast.routed import form_of, loops, recurrence, score_of
from anabranch.serving.fast.supported import products, why_not

__all__ = ["FastDecoder"]

ACTIVATIONS = ("softmax", "sigmoid", "sqrt_softplus")
NORMALIZE = ("none", "sum", "softmax")
QK_NORM = ("none", "head", "full")

# Bytes; matrices begin at pages.
ALIGN = 4096

# And the parts of a step's memory at multiples of this.
PIECE = 64


class FastDecoder:
    """The compiled form of ``model``. Its weights are those at the time: what is trained afterwards is seen after `reread`.

    Linear layers in float32 and bfloat16 are packed into memory of their own; quantised ones share theirs. Offloaded
    experts are read in their slots, when they have come: whoever calls tells the `OffloadEngine` that a step begins.

    Args:
        model: one that `supports`, in evaluation mode.
        key_ASGW: the store of keys, float32 or bfloat16; a position's slot is ``block * block_tokens + offset``.
        value_ASGW: that of values.
        block_tokens: positions per block.
        takes_weights: the model is nobody else's: its layers in floating point give way to ones that share the packed memory, so that no
            weight is there twice. Otherwise it keeps them, beside.

    Attributes:
        routed: the layer of each routing, in order; one that routes several times is there as often.
        adapters: makes what a step is told of adapters.

    Raises:
        ConfigError: a model that is not supported, or stores of another shape.
    """

    @staticmethod
    def supports(model: Decoder) -> str | None:
        """Why not, or None."""
        return why_not(model)

    def __init__(
        self, model: Decoder, key_ASGW: Tensor, value_ASGW: Tensor, *, block_tokens: int, takes_weights: bool = False
    ) -> None:
        reason = self.supports(model)
        if reason is not None:
            raise ConfigError(f"no compiled step for this model: {reason}")
        attention: Any = plain_of(model.blocks[0].attention)
        widths: Any = attention.config
        self.model = model
        # What the structures point at.
        self._keep: list[Tensor] = []
        self._parts: list[Any] = []
        self._packed = _pack(model, takes_weights)
        self._head = self._packed.get(model.head if model.head is not None else model.embedding)
        self._recurrent: dict[Tensor, Packed] = {}
        self._memory = torch.empty(0, dtype=torch.uint8)
        # By number of the routing.
        self._offloaded: dict[int, OffloadedPool] = {}
        self.routed: list[int] = []
        routers: list[Any] = []
        of_layers = [list(self._blocks(number, routers)) for number in range(len(model.blocks))]
        first_block = [0, *accumulate(map(len, of_layers))]
        made = [part for of_layer in of_layers for part in of_layer]
        self.adapters = AdapterTables(model, first_block[:-1], len(made))
        blocks = (CBlock * len(made))(*made)
        self._stops = [
            block for block, part in enumerate(made) if part.experts.router and part.experts.number in self._offloaded
        ]
        config, most_loops = model.config, max(block.loops.most for block in made)
        self._most_top_k = max((router.select.config.top_k for router in routers), default=0)
        self._model = CModel(
            len(blocks),
            config.dim,
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_dim,
            max(_hidden(form_of(block.feed_forward)) for block in model.blocks),
            block_tokens,
            0,
            max((router.num_destinations for router in routers), default=0),
            self._most_top_k,
            max(map(_state_dim, routers), default=0),
            max(self._most_top_k, 2 if most_loops else 1),
            most_loops,
            config.norm_eps,
            widths.norm_eps,
            widths.clip_qkv or 0.0,
            QK_NORM.index(widths.qk_norm),
            0,
            floats(model.norm.weight, self._keep, config.dim),
            blocks,
        )
        check_sizes(self._model)
        self.use_stores(key_ASGW, value_ASGW)

    @torch.no_grad()
    def reread(self) -> None:
        """Take in what has become of the model's weights in their places, between two steps. Shapes must be as they were."""
        for module, own in self._packed.items():
            for part, weight in zip(own, _weights_of(module), strict=True):
                _put(part, weight)
        for weight, part in self._recurrent.items():
            _put(part, weight)
        # Whatever is copied is copied again, in the same order; what points at the copies goes on to.
        copies, routed, recurrent = self._keep, self.routed, self._recurrent
        self._keep, self.routed, self._recurrent = [], [], {}
        try:
            routers: list[Any] = []
            for number in range(len(self.model.blocks)):
                list(self._blocks(number, routers))
            floats(self.model.norm.weight, self._keep, self.model.config.dim)
            for copy, now in zip(copies, self._keep, strict=True):
                if copy.data_ptr() != now.data_ptr():
                    copy.copy_(now)
        finally:
            self._keep, self.routed, self._recurrent = copies, routed, recurrent

    def use_stores(self, key_ASGW: Tensor, value_ASGW: Tensor) -> None:
        """Read and write these keys and values from now on. Raises ConfigError if they are of another shape."""
        self._check_stores(self.model, key_ASGW, value_ASGW)
        self._stores = key_ASGW, value_ASGW
        self._model.slots = key_ASGW.shape[1]
        self._model.half_store = int(key_ASGW.dtype == torch.bfloat16)
        layers = (block for block in self._model.blocks[: self._model.layers] if block.qkv.rows)
        for block, key_SGW, value_SGW in zip(layers, key_ASGW, value_ASGW, strict=True):
            block.key, block.value = address(key_SGW), address(value_SGW)

    def hidden(
        self,
        token_T: Tensor,
        position_T: Tensor,
        sequence_N4: NDArray[np.int64],
        table_U: NDArray[np.int32],
        *,
        with_routes: bool = False,
        adapters: AdapterUses | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(x_TD, route_ATK): float32 hidden states after the last norm; writes the store.

        Args:
            token_T: int64 token ids, sequence after sequence.
            position_T: int64, position of each.
            sequence_N4: of each sequence its first row, how many, how many positions are stored before, and where its blocks begin in
                ``table_U``.
            table_U: int32 numbers of blocks.
            with_routes: also give int32 ``[routed layers, T, K]``, the experts of each token, -1 where a layer has fewer.
            adapters: of the tokens; None where none has any.
        """
        model = self.model
        x_TD = model.embedding(token_T).float()
        cos, sin = model.rotary(position_T[None], torch.float32)
        routes = None
        if with_routes or self._stops:
            routes = torch.empty(len(self.routed), len(token_T), self._most_top_k, dtype=torch.int32)
        sequence_N4, table_U = np.ascontiguousarray(sequence_N4), np.ascontiguousarray(table_U)
        self._make_room(len(token_T), 0 if adapters is None else adapters.lows)
        count, angles = len(token_T), (1, 1, len(token_T), self._model.width)
        step = CStep(
            count,
            array_address(sequence_N4, "int64", None, 4),
            len(sequence_N4),
            array_address(table_U, "int32", None),
            len(table_U),
            address(cos, "float32", *angles),
            address(sin, "float32", *angles),
            address(x_TD, "float32", count, self._model.dim),
            None if routes is None else address(routes),
            address(self._memory),
        )
        if adapters is not None:
            adapters.put(step)
        for first, last in pairwise((-1, *self._stops, -1)):
            self._run(step, first, last)
            if last >= 0:
                assert routes is not None, "made above"
                self._run_experts(step, last, routes)
        return x_TD, routes if with_routes else None

    @property
    def is_by_block(self) -> bool:
        """Whether each layer is one part that hands nothing to others beside its output, with all its weights in memory."""
        is_single = self._model.layers == len(self.model.blocks)
        return is_single and not self._stops and not self._model.state

    @property
    def tells_routes(self) -> bool:
        """Whether ``with_routes`` tells of all routers: of heads it does not."""
        return not any(self._model.blocks[number].heads.pair for number in range(self._model.layers))

    @property
    def structure(self) -> CModel:
        """What the kernel is told of the model; it points at what this object keeps."""
        return self._model

    def room(self, num_tokens: int) -> Tensor:
        """Memory for what a step of so many tokens works out on its way; for one at a time."""
        self._make_room(num_tokens, False)
        return self._memory

    def logits(self, x_RD: Tensor) -> Tensor:
        """Scores over the vocabulary, float32."""
        if self._head is None:
            return self.model.logits(x_RD.to(self.model.embedding.weight.dtype)).float()
        bias = None if self.model.head is None else self.model.head.bias
        return native.linear(self._head[0], x_RD, bias)

    def _make_room(self, num_tokens: int, lows: int) -> None:
        """For what a step works out on its way; ``lows`` are those of its adapters."""
        wanted = BYTES(self._model, num_tokens, lows)
        if wanted > len(self._memory):
            self._memory = torch.empty(wanted, dtype=torch.uint8)

    def _run(self, step: CStep, first: int, last: int) -> None:
        """From the experts of block ``first`` (-1: the beginning) to the router of ``last`` (-1: the end)."""
        STEP(self._model, step, first, last)

    def _run_experts(self, step: CStep, block: int, routes_ATK: Tensor) -> None:
        """The experts of a block as they come into their slots."""
        experts = self._model.blocks[block].experts
        pool, index_TK = self._offloaded[experts.number], routes_ATK[experts.number, :, : experts.top_k]
        seen_TD, carry = (None, {}) if not pool.is_watched else self._seen(step.tokens, experts)
        for slot_of in pool.waves(np.unique(index_TK.numpy()).tolist(), seen_TD, index_TK, carry):
            slot_E = np.full(experts.count, -1, np.int32)
            slot_E[list(slot_of)] = list(slot_of.values())
            EXPERTS(self._model, step, block, slot_E, len(pool.w13_SFD))

    def _seen(self, num_tokens: int, experts: CExperts) -> tuple[Tensor, dict[str, Tensor]]:
        """What the experts of the layer under way see, x_TD, and what its router hands on."""
        found, start = [], 0
        for width in (self._model.dim, self._model.state):
            part = self._memory[start : start + num_tokens * width * 4].view(torch.float32)
            found.append(part.view(num_tokens, width))
            start += -(-part.nbytes // PIECE) * PIECE
        carry = {"routing_state": found[1]} if experts.recurrence.hands_on else {}
        return found[0].to(self.model.embedding.weight.dtype), carry

    @staticmethod
    def _check_stores(model: Decoder, key_ASGW: Tensor, value_ASGW: Tensor) -> None:
        attention: Any = plain_of(model.blocks[0].attention)
        shape = (len(model.blocks), attention.num_kv_heads, attention.head_dim)
        for store in (key_ASGW, value_ASGW):
            if store.dtype not in KIND_OF or store.device.type != "cpu" or store.dtype != key_ASGW.dtype:
                raise ConfigError(f"the store is {store.dtype} on {store.device}; use float32 or bfloat16 on the CPU")
            if (store.shape[0], *store.shape[2:]) != shape or not store[0].is_contiguous():
                raise ConfigError(
                    f"the store has shape {list(store.shape)}; it must be [{shape[0]}, slots, {shape[1]}, {shape[2]}]"
                )

    def _matrix(self, module: nn.Module | None, place: int = 0) -> Matrix:
        """What the kernels are told of one matrix; an empty one for None."""
        if module is None:
            return Matrix()
        packed: Any = self._packed[module]
        return self._told(packed if isinstance(module, PartedLinear) else packed[place])

    def _told(self, packed: Matrices | Sequence[Packed]) -> Matrix:
        """What the kernels are told of matrices."""
        if isinstance(packed, Packed):
            return native.matrix(packed)
        made, behind = native.matrix_of_parts(packed)
        # They point at one another.
        self._parts.append(behind)
        return made

    def _blocks(self, number: int, routers: list[Router]) -> Iterator[CBlock]:
        """One layer: attention and feed-forward, then the passes without attention; its routers are added to ``routers``."""
        block: Any = self.model.blocks[number]
        attention, form, keep = plain_of(block.attention), form_of(block.feed_forward), self._keep
        norms = (
            (None, None) if attention.config.qk_norm == "none" else (attention.q_norm.weight, attention.k_norm.weight)
        )
        dim, width = self.model.config.dim, attention.head_dim
        query, stored = attention.num_heads * width, attention.num_kv_heads * width
        normed = (width, width) if attention.config.qk_norm == "head" else (query, stored)
        first = CBlock(
            floats(block.attention_norm.weight, keep, dim),
            floats(block.feed_forward_norm.weight, keep, dim),
            floats(attention.qkv.bias, keep, query + 2 * stored),
            floats(attention.out.bias, keep, dim),
            *(floats(norm, keep, size) for norm, size in zip(norms, normed, strict=True)),
            None,
            None,
            self._matrix(attention.qkv),
            self._matrix(attention.out),
        )
        first.heads = heads(block.attention, dim, keep)
        if not isinstance(form, Passes):
            first.w13, first.w2 = self._matrix(form.w13), self._matrix(form.w2)
            if isinstance(form, Loops):
                first.loops = loops(form, keep)
                first.experts = self._router(form.router, number, routers)
            yield first
            return
        for turn, router in enumerate(form.routers):
            made = first if turn == 0 else CBlock(feed_forward_norm=first.feed_forward_norm)
            made.experts = self._router(router, number, routers)
            self._add_experts(made.experts, form)
            yield made

    def _router(self, router: Any, number: int, routers: list[Router]) -> CExperts:
        """A router of layer ``number``, with no experts yet; it is added to ``routers``."""
        keep, select, count = self._keep, router.select.config, router.num_destinations
        score = score_of(router)
        depth = _state_dim(router) or self.model.config.dim
        self.routed.append(number)
        routers.append(router)
        return CExperts(
            router=floats(score.weight, keep, count, depth),
            bias=floats(router.bias_E, keep, count),
            recurrence=recurrence(score, keep, self._recurrent),
            count=count,
            top_k=select.top_k,
            activation=ACTIVATIONS.index(score.activation),
            normalize=NORMALIZE.index(select.normalize),
            scale=select.scale,
            number=len(routers) - 1,
        )

    def _add_experts(self, made: CExperts, form: Passes) -> None:
        """What ``made`` routes to: the pool of ``form``, its shared experts, and what is added to its input."""
        pool = form.experts
        if isinstance(pool, OffloadedPool):
            self._offloaded[made.number] = pool
            slots = (pool.w13_SFD, pool.w2_SDF)
            made.w13, made.w2 = map(self._told, pool.packed) if pool.packed else map(native.matrix_of_rows, slots)
        else:
            made.w13, made.w2 = self._matrix(pool), self._matrix(pool, 1)
        if form.shared is not None:
            made.shared13, made.shared2 = self._matrix(form.shared.w13), self._matrix(form.shared.w2)
        dim = self.model.config.dim
        made.gate = floats(None if form.shared_gate is None else form.shared_gate.weight, self._keep, 1, dim)
        made.shift = floats(form.shift_D, self._keep, dim)


def _hidden(form: FeedForwardForm) -> int:
    """Widest hidden layer of a feed-forward."""
    if not isinstance(form, Passes):
        return form.w2.in_features
    return max(form.experts.hidden_dim, 0 if form.shared is None else form.shared.w2.in_features)


def _state_dim(router: Any) -> int:
    """P, 0 for a router without a state."""
    cell = score_of(router).cell
    return 0 if cell is None else cell.state_dim


@torch.no_grad()
def _pack(model: Decoder, takes_weights: bool) -> Mapping[nn.Module, Sequence[Any]]:
    """The packed matrices of each module, all in one piece of memory with large pages.

    With ``takes_weights`` modules in floating point, which would be there twice, give way to ones that share this memory.
    """
    head: Any = model.head if model.head is not None else model.embedding
    found = dict.fromkeys((*(part for block in model.blocks for part in products(block)), head))
    like = {module: parts for module in found if (parts := _sizes_of(module))}
    sizes = [-(-part.nbytes // ALIGN) * ALIGN for parts in like.values() for part in parts]
    memory = torch.empty(sum(sizes), dtype=torch.uint8)
    native.advise(memory)
    start, pieces = 0, iter(sizes)
    packed: dict[nn.Module, list[Any]] = {}
    names = {module: name for name, module in model.named_modules()}
    while like:
        module = next(iter(like))
        own: list[Any] = []
        for part, weight in zip(like.pop(module), _weights_of(module), strict=True):
            own.append(part.with_data(memory[start : start + part.nbytes].view(part.data.shape)))
            start += next(pieces)
            _put(own[-1], weight)
        if isinstance(module, QuantizedLinear):
            if _is_table_of(model.embedding, module):
                model.embedding.data = own[0].data
            module.data = own[0].data
        elif isinstance(module, PartedLinear):
            module.put(own)
        elif isinstance(module, QuantizedPool):
            module.data13, module.data2 = own[0].data, own[1].data
        elif takes_weights:
            found.pop(module)
            module = _in_place(model, names.pop(module), module, own)
        packed[module] = own
    if takes_weights:
        # What was let go of would stay with the C library, for nobody to use.
        give_back_freed()
    return packed


def _is_table_of(embedding: Any, head: QuantizedLinear) -> bool:
    """Whether an embedding has the memory of a head."""
    return isinstance(embedding, PackedEmbedding) and embedding.data.data_ptr() == head.data.data_ptr()


def _in_place(model: Any, name: str, module: Any, own: Sequence[Any]) -> nn.Module:
    """What stands from now on where ``module`` stood: it computes with the packed weights."""
    made: nn.Module
    if isinstance(module, nn.Embedding):
        replace(model, name, PackedEmbedding(own[0]))
        # The head, which it was too.
        model.head = made = QuantizedLinear(own[0])
        return made
    made = QuantizedPool(own[0], own[1]) if isinstance(module, ExpertPool) else QuantizedLinear(own[0], module.bias)
    replace(model, name, made)
    return made


def _put(packed: Any, weight: Matrices | Tensor) -> None:
    """Write the weights to the place that ``packed`` has for them."""
    if not isinstance(weight, Tensor):
        packed.data.copy_(weight.data)
        return
    for expert, matrix in enumerate(weight if weight.dim() == 3 else weight.unsqueeze(0)):
        packed.put(expert, matrix)


def _sizes_of(module: Any) -> list[Matrices]:
    """The matrices of a module without their weights; none for a head that cannot be packed, which the model runs itself."""
    made: list[Matrices] = []
    for weight in _weights_of(module):
        if not isinstance(weight, Tensor):
            made.append(weight)
            continue
        if weight.dtype not in KIND_OF or weight.shape[-1] % SHARE:
            return []
        num, (rows, depth) = len(weight) if weight.dim() == 3 else 1, weight.shape[-2:]
        made.append(Packed.empty(num, rows, depth, KIND_OF[weight.dtype], depth, device="meta"))
    return made


def _weights_of(module: Any) -> Sequence[Matrices | Tensor]:
    """The matrices of a module: quantised ones as they are."""
    if isinstance(module, QuantizedLinear):
        return [module.packed]
    if isinstance(module, PartedLinear):
        return module.parts
    if isinstance(module, QuantizedPool):
        return module.packed
    if isinstance(module, ExpertPool):
        return [weight.detach() for weight in module.stacks]
    return [module.weight.detach()] if is_plain(module) or type(module) is nn.Embedding else []
