"""`NanoRunner`: a model runner whose layers run as nano-operations of a schedule.

The rows of a step stand with decodes first, then chunks of prompts. Every projection and the feed-forward is cut by rows; attention of
prompts is cut between sequences, since a row attends to what the rows of its own sequence before it have stored. Outputs are those of
the whole batch, whatever the cuts and the executor.
"""
# Shapes: T rows of a step, R rows that sample, H query heads, G key-value heads, D head width, W model width, F hidden width, V vocabulary

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.errors import InputError
from anabranch.nn.attention import SelfAttention
from anabranch.nn.block import PreNorm
from anabranch.nn.context import ForwardContext
from anabranch.nn.feed_forward import FeedForward, SwiGLU
from anabranch.nn.linear import call_linear, takes_context
from anabranch.serving.core.batch import Chunk
from anabranch.serving.engine.layout import StepLayout
from anabranch.serving.engine.paged import PagedStore
from anabranch.serving.engine.runner import ModelRunner
from anabranch.serving.nanoflow.execute import Executor, Sequential, Streams, Threads
from anabranch.serving.nanoflow.step_plan import StepPlan
from anabranch.serving.planning.cost import TILE
from anabranch.serving.planning.graph import LayerGraph, NanoOp, Operation
from anabranch.serving.planning.search import Pipeline
from anabranch.serving.planning.simulate import Schedule


class NanoRunner(ModelRunner):
    """A `ModelRunner` for overlap.

    Args:
        model: a decoder.
        pipeline: a searched one, whose cuts, order and shares are fitted to each step; None for halves.
        parts: for each operation the shares of the batch at which it is cut, instead of a pipeline.
        executor: None for streams on CUDA, threads on a CPU of several cores, else one after the other.
        min_tokens: steps of fewer rows are not cut.
        tile: rows that cuts are multiples of.
        options: of `ModelRunner`.

    Models of parallel streams, of a head that routes, or of other blocks and attention than the plain ones, deterministic
    runners, hooks that override requests, requests with paths or adapters of their own, and steps that record routing or are watched by
    hooks run whole.
    """

    def __init__(
        self,
        model: Any,
        *,
        pipeline: Pipeline | None = None,
        parts: Mapping[str, Sequence[float]] | None = None,
        executor: Executor | None = None,
        min_tokens: int = 2 * TILE,
        tile: int = TILE,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if pipeline is not None and parts is not None:
            raise InputError("pipeline and parts both say how to cut; give one")
        self.plan = StepPlan.of_cuts(parts) if pipeline is None else StepPlan.of(pipeline)
        self.executor: Executor = executor or default_executor(self.device)
        self.min_tokens, self.tile = max(min_tokens, 2), tile
        self._is_known = all(
            type(block) is PreNorm and type(block.attention) is SelfAttention for block in self.model.blocks
        )
        self._is_known = self._is_known and self.model.config.has_plain_attention
        # A head that routes is told of the items of a whole pass, and goes on with what its routers carry.
        self._is_known = self._is_known and not takes_context(self.model.head)
        # Steps that were.
        self.num_cut = 0

    def _hidden(self, chunks: Sequence[Chunk], tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        is_recorded = any(chunk.id in self.requests.recorded for chunk in chunks)
        is_whole = self.deterministic or self.model.streams is not None or is_recorded or self.watch.is_watched
        variant = self.ways.of(chunks[0])
        others = any(
            each.path is not None or each.chooser is not None or each.is_pruned for each in map(self.ways.of, chunks)
        )
        is_whole = is_whole or not self._is_known or others or variant.is_adapted or variant.task is not None
        if is_whole or self.requests.overrides is not None or len(tokens) < self.min_tokens:
            return super()._hidden(chunks, tokens, rows)
        step = _Step(self, chunks, tokens)
        self.executor.run(step.schedule, step.work, len(self.model.blocks))
        self.num_cut += 1
        return step.normed(rows)


def default_executor(device: torch.device) -> Executor:
    """What suits a device."""
    if device.type == "cuda":
        return Streams(device)
    cores = torch.get_num_threads()
    return Threads({"compute": cores - 1, "memory": 1}) if cores > 1 else Sequential()


class _Step:
    """One step: its rows, its buffers, and what each nano-operation does with them."""

    def __init__(self, runner: NanoRunner, chunks: Sequence[Chunk], tokens: Sequence[int]) -> None:
        self.runner, self.model = runner, runner.model
        # Stable: decodes first.
        self.order = sorted(range(len(chunks)), key=lambda number: len(chunks[number].tokens) > 1)
        self.chunks = [chunks[number] for number in self.order]
        starts, first = [], 0
        for chunk in chunks:
            starts.append(first)
            first += len(chunk.tokens)
        # Rows of the batch as they stand here.
        standing = [
            row for number in self.order for row in range(starts[number], starts[number] + len(chunks[number].tokens))
        ]
        self.place = {row: place for place, row in enumerate(standing)}
        self.tokens = [tokens[row] for row in standing]
        self.edges = [0]
        for chunk in self.chunks:
            self.edges.append(self.edges[-1] + len(chunk.tokens))
        self.num_decodes = sum(len(chunk.tokens) == 1 for chunk in self.chunks)
        self.schedule = self._schedule()
        self._prepare()

    def _schedule(self) -> Schedule:
        total, decodes = len(self.tokens), self.num_decodes
        spans = {"decode_attention": (0, decodes), "prefill_attention": (decodes, total)}
        after = {
            "kqv": (),
            "decode_attention": ("kqv",),
            "prefill_attention": ("kqv",),
            "o": ("decode_attention", "prefill_attention"),
            "up_gate": ("o",),
            "down": ("up_gate",),
        }
        made: list[Operation] = []
        for name, others in after.items():
            start, end = spans.get(name, (0, total))
            if end > start:
                there = tuple(other for other in others if any(operation.name == other for operation in made))
                made.append(Operation(name, self.runner.plan.resources[name], start, end, there, float))
        graph = LayerGraph(tuple(made), total, ("kqv",), ("down",)).split(self._cuts(made))
        return self.runner.plan.schedule(graph)

    def _cuts(self, operations: Sequence[Operation]) -> dict[str, list[int]]:
        """Cuts in whole tiles; of attention of prompts between sequences, of the feed-forward alike where it is one piece."""
        cuts = {}
        for operation in operations:
            size = operation.end - operation.start
            wanted = [operation.start + size * share for share in self.runner.plan.cuts.get(operation.name, ())]
            if operation.name == "prefill_attention":
                cuts[operation.name] = [min(self.edges, key=lambda edge: abs(edge - at)) for at in wanted]
            else:
                tile = self.runner.tile
                cuts[operation.name] = [operation.start + round((at - operation.start) / tile) * tile for at in wanted]
        return cuts

    def _prepare(self) -> None:
        runner, model = self.runner, self.model
        device, size = runner.device, runner.pool.block_tokens
        self.token_1T = torch.tensor([self.tokens], dtype=torch.int64, device=device)
        self.context = runner.modules.context(StepLayout(self.chunks, size, device), self.token_1T, self.chunks)
        self.x_1TW = model.embed(self.token_1T)
        total = len(self.tokens)
        attention: Any = model.blocks[0].attention
        heads = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
        self.qkv = tuple(self.x_1TW.new_empty(1, number, total, attention.head_dim) for number in heads)
        self.y_1TW = self.x_1TW.new_empty(1, total, attention.num_heads * attention.head_dim)
        self.hidden: dict[int, Tensor] = {}
        ops = self.schedule.graph.ops
        self.contexts = {
            (op.start, op.end): _rows(self.context, op.start, op.end) for op in ops if not op.op.endswith("attention")
        }
        self.stores = {(op.start, op.end): self._store(op) for op in ops if op.op.endswith("attention")}

    def _store(self, op: NanoOp) -> PagedStore:
        """The view of the sequences that stand in a range."""
        inside = [chunk for chunk, start in zip(self.chunks, self.edges, strict=False) if op.start <= start < op.end]
        layout = StepLayout(inside, self.runner.pool.block_tokens, self.runner.device)
        return PagedStore(self.runner.pool, layout, use_kernel=self.runner.use_kernel)

    def work(self, layer: int, op: NanoOp) -> None:
        """One nano-operation of one layer."""
        block: Any = self.model.blocks[layer]
        rows = slice(op.start, op.end)
        if op.op == "kqv":
            parts = block.attention.project(block.attention_norm(self.x_1TW[:, rows]), self.contexts[op.start, op.end])
            for full, part in zip(self.qkv, parts, strict=True):
                full[:, :, rows] = part
        elif op.op.endswith("attention"):
            y_1HTD = self.stores[op.start, op.end].attend(layer, *(part[:, :, rows].contiguous() for part in self.qkv))
            self.y_1TW[:, rows] = y_1HTD.transpose(1, 2).flatten(2)
        elif op.op == "o":
            self.x_1TW[:, rows] += call_linear(
                block.attention.out, self.y_1TW[:, rows], self.contexts[op.start, op.end]
            )
        elif op.op == "up_gate":
            self._up_gate(block, rows, self.contexts[op.start, op.end])
        else:
            self._down(block, rows, self.contexts[op.start, op.end])

    def _up_gate(self, block: Any, rows: slice, context: ForwardContext) -> None:
        if not _is_plain(block.feed_forward):
            # Experts and other designs are one piece, done with ``down``.
            return
        gate, up = call_linear(block.feed_forward.w13, block.feed_forward_norm(self.x_1TW[:, rows]), context).chunk(
            2, dim=-1
        )
        hidden = F.silu(gate) * up
        buffer = self._hidden(hidden.shape[-1], hidden)
        buffer[:, rows] = hidden

    def _down(self, block: Any, rows: slice, context: ForwardContext) -> None:
        feed_forward = block.feed_forward
        if _is_plain(feed_forward):
            hidden = self._hidden(block.feed_forward.config.hidden_dim, self.x_1TW)
            self.x_1TW[:, rows] += call_linear(feed_forward.w2, hidden[:, rows], context)
        else:
            self.x_1TW[:, rows] = feed_forward.add_to(self.x_1TW[:, rows], block.feed_forward_norm, context)

    def _hidden(self, width: int, like: Tensor) -> Tensor:
        """The buffer between up and down; one for all layers of a width, as a range is written only after it was read."""
        if width not in self.hidden:
            self.hidden[width] = like.new_empty(1, len(self.tokens), width)
        return self.hidden[width]

    def normed(self, rows: Sequence[int]) -> Tensor:
        """x_RW of ``rows`` of the batch, after the last norm."""
        return self.model.norm(self.x_1TW[0, [self.place[row] for row in rows]])


def _is_plain(feed_forward: FeedForward) -> bool:
    """Whether it is W2 (silu(W1 x) * W3 x) added to the stream and nothing else."""
    return type(feed_forward) is SwiGLU


def _rows(context: ForwardContext, start: int, end: int) -> ForwardContext:
    """The context of some rows, with what a design carries down the layers of its own."""
    cos, sin = context.rotary
    return replace(
        context.fork({}),
        position_BL=context.position_BL[:, start:end],
        rotary=(cos[:, :, start:end], sin[:, :, start:end]),
        token_BL=None if context.token_BL is None else context.token_BL[:, start:end],
        sequences=None if context.sequences is None else context.sequences[start:end],
        sequence_length=end - start,
    )
