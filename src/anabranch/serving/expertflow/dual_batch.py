"""The dual-batch pipeline: decode batches in pairs, whose tokens the Token Scheduler regroups before each step.

Sequences are divided into *units* of two batches; units take turns. While one runs, the next one's routes are predicted and its tokens
regrouped on another thread. The Expert Cache Engine knows the routes of both batches of a unit and, once they are predicted, of the
next, so it looks two or three forward passes ahead.

The keys and values of all sequences lie in one place (`RowStore`), so that regrouping is a choice of rows and copies nothing.
"""
# Shapes: B rows of a batch, T tokens, A layers, L routed ones, E experts, H heads, G key-value heads, W head width, S slots, M positions

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.errors import CapacityError, ConfigError
from anabranch.lm.generate import SamplingConfig, sample
from anabranch.nn.context import ForwardContext
from anabranch.serving.expertflow.expertflow import OffloadEngine
from anabranch.serving.expertflow.layout import Expert
from anabranch.serving.expertflow.predictors.base import Row
from anabranch.serving.expertflow.token_scheduler import TokenScheduler, likeliest, reindex
from anabranch.serving.fast import FastDecoder, Watch

# Positions that lie together.
BLOCK_TOKENS = 16

# Of sequences in this process.
_SERIAL = count()


class RowStore:
    """Keys and values of many sequences, each with a length of its own; a forward pass is over some of them (`AttendingStore`).

    Args:
        num_rows: sequences.
        max_length: positions of each.
        shape: (layers, key-value heads, width of a head).
        dtype: of what is stored.

    Attributes:
        key_ASGW, value_ASGW: of slot ``row * capacity + position``, in blocks of `BLOCK_TOKENS` for the compiled step.
    """

    def __init__(
        self, num_rows: int, max_length: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> None:
        layers, groups, width = shape
        self.length_R = torch.zeros(num_rows, dtype=torch.int64)
        self.max_length, self._blocks = max_length, -(-max_length // BLOCK_TOKENS)
        # Zeros: what lies behind the end of a row weighs nothing in the products, and nothing times NaN would be NaN.
        slots = num_rows * self._blocks * BLOCK_TOKENS
        self.key_ASGW, self.value_ASGW = torch.zeros(2, layers, slots, groups, width, dtype=dtype)
        self._rows = torch.empty(0, dtype=torch.int64)

    def select(self, rows: Sequence[int], new: int) -> None:
        """The rows of the next forward pass, in its order, and how many positions each adds. Raises CapacityError if they do not fit."""
        self._rows = torch.tensor(rows, dtype=torch.int64)
        longest = int(self.length_R[self._rows].max()) + new
        if longest > self.max_length:
            raise CapacityError(f"the store holds {self.max_length} positions, but {longest} are needed")

    def layout(self, new: int) -> tuple[np.ndarray, np.ndarray]:
        """(sequence_N4, table_U) of the forward pass, see `FastDecoder.hidden`."""
        count, rows_N = len(self._rows), self._rows.numpy()
        first_N, table_N = np.arange(count) * new, np.arange(count) * self._blocks
        sequence_N4 = np.stack((first_N, np.full(count, new), self.length_R[self._rows].numpy(), table_N), 1)
        table_U = (rows_N[:, None] * self._blocks + np.arange(self._blocks)).astype(np.int32)
        return sequence_N4, table_U.reshape(-1)

    def attend(self, layer: int, query_BHLW: Tensor, key_BGLW: Tensor, value_BGLW: Tensor) -> Tensor:
        """See `AttendingStore`. One new position a row, or prompts of one length of rows that have none yet."""
        _, groups, new, _ = key_BGLW.shape
        key_RMGW, value_RMGW = (
            stored[layer].view(len(self.length_R), -1, *stored.shape[2:]) for stored in (self.key_ASGW, self.value_ASGW)
        )
        rows, start_B = self._rows, self.length_R[self._rows]
        longest = int(start_B.max()) + new
        grouped = query_BHLW.shape[1] != groups
        if new > 1:
            assert longest == new, "prompts are read whole"
            key_RMGW[rows, :new], value_RMGW[rows, :new] = key_BGLW.transpose(1, 2), value_BGLW.transpose(1, 2)
            return F.scaled_dot_product_attention(query_BHLW, key_BGLW, value_BGLW, is_causal=True, enable_gqa=grouped)
        key_RMGW[rows, start_B], value_RMGW[rows, start_B] = key_BGLW[:, :, 0], value_BGLW[:, :, 0]
        key_BGMW, value_BGMW = (stored[rows, :longest].transpose(1, 2) for stored in (key_RMGW, value_RMGW))
        mask = (torch.arange(longest) <= start_B[:, None])[:, None, None]
        return F.scaled_dot_product_attention(query_BHLW, key_BGMW, value_BGMW, attn_mask=mask, enable_gqa=grouped)

    def advance(self, new: int) -> None:
        """The selected rows have so many positions more."""
        self.length_R[self._rows] += new


@dataclass
class _Unit:
    """Sequences that are decoded in two batches.

    Attributes:
        batches: rows of the next two forward passes.
        wanted: what the layers of each of them are predicted to want; None without a prediction.
        ready: when ``batches`` and ``wanted`` are those of the next step.
    """

    rows: list[int]
    batches: list[list[int]] = field(default_factory=list)
    wanted: list[list[list[Expert]]] | None = None
    ready: Future | None = None


class DualBatch:
    """Generates with an offloaded model, two batches at a time.

    Args:
        engine: from `offload`.
        batch_size: T, sequences of a batch.
        scheduler: None leaves tokens in the batches they are in.
        use_kernel: run the model by the compiled step where `FastDecoder` knows it, and nobody listens inside the model.

    Attributes:
        objective_before, objective_after: experts that the batches of all units load, as they were and regrouped, by prediction.

    Raises ConfigError for a model of several streams.
    """

    def __init__(
        self,
        engine: OffloadEngine,
        *,
        batch_size: int = 4,
        scheduler: TokenScheduler | None = TokenScheduler(),  # noqa: B008
        use_kernel: bool = True,
    ) -> None:
        if engine.model.streams is not None:
            raise ConfigError("the dual-batch pipeline runs one stream; leave out ParScale")
        if not engine.model.config.has_plain_attention:
            raise ConfigError(
                "the dual-batch pipeline runs attention without windows, sinks, a scale, a temperature or compressed keys"
            )
        self.engine, self.batch_size, self.scheduler = engine, batch_size, scheduler
        self.use_kernel = use_kernel
        self._fast: FastDecoder | None = None
        self._watch = Watch(engine.model)
        self.objective_before = self.objective_after = 0

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], config: SamplingConfig | None = None) -> list[list[int]]:
        """Continue each prompt; the new tokens of each. Greedy tokens are those of `anabranch.lm.generate`."""
        config = config or SamplingConfig()
        model = self.engine.model.eval()
        longest = max((len(prompt) for prompt in prompts), default=0) + config.max_tokens
        attention = model.config.attention
        shape = (model.config.num_layers, attention.kv_heads, attention.width(model.config.dim))
        self._store = RowStore(len(prompts), longest, shape, model.embedding.weight.dtype)
        self._compile()
        self._prompt = [len(prompt) for prompt in prompts]
        self._length, self._id_RM = list(self._prompt), np.zeros((len(prompts), longest), np.int32)
        for id_M, prompt in zip(self._id_RM, prompts, strict=True):
            id_M[: len(prompt)] = prompt
        self._keys = [f"row-{next(_SERIAL)}" for _ in prompts]
        generator = torch.Generator().manual_seed(config.seed)
        pair = 2 * self.batch_size
        units = [_Unit(list(range(first, min(first + pair, len(prompts))))) for first in range(0, len(prompts), pair)]
        with ThreadPoolExecutor(1) as beside:
            for unit in units:
                self._read(unit, config, generator)
            self._decode([unit for unit in units if unit.rows], config, generator, beside)
        for key in self._keys:
            if self.engine.predictor is not None:
                self.engine.predictor.forget(key)
        parts = zip(self._id_RM, self._prompt, self._length, strict=True)
        return [id_M[prompt:length].tolist() for id_M, prompt, length in parts]

    def _compile(self) -> None:
        """The compiled step on the store, packed once, or None."""
        model, stores = self.engine.model, (self._store.key_ASGW, self._store.value_ASGW)
        if not self.use_kernel or FastDecoder.supports(model) is not None:
            self._fast = None
        elif self._fast is None:
            self._fast = FastDecoder(model, *stores, block_tokens=BLOCK_TOKENS)
        else:
            self._fast.use_stores(*stores)

    def _read(self, unit: _Unit, config: SamplingConfig, generator: torch.Generator) -> None:
        """Run the prompts, those of one length together, so that an expert is loaded once for all; each gives its first token."""
        if not config.max_tokens:
            unit.rows.clear()
        of_length: dict[int, list[int]] = {}
        for row in unit.rows:
            of_length.setdefault(self._prompt[row], []).append(row)
        for length, alike in of_length.items():
            for first in range(0, len(alike), self.batch_size):
                batch = alike[first : first + self.batch_size]
                rows = self._described(batch, length)
                self.engine.begin(rows)
                self._take(unit, batch, self._run(batch, rows), config, generator)

    def _decode(
        self, units: list[_Unit], config: SamplingConfig, generator: torch.Generator, beside: ThreadPoolExecutor
    ) -> None:
        if units:
            units[0].ready = beside.submit(self._prepare, units[0])
        while units:
            unit = units.pop(0)
            assert unit.ready is not None
            unit.ready.result()
            if units:
                units[0].ready = beside.submit(self._prepare, units[0])
            for number, batch in enumerate(unit.batches):
                rows = self._described(batch, 1)
                self.engine.begin(rows, _known(unit, number, units))
                self._take(unit, batch, self._run(batch, rows), config, generator)
            if unit.rows:
                units.append(unit)
                if len(units) == 1:
                    unit.ready = beside.submit(self._prepare, unit)

    def _prepare(self, unit: _Unit) -> None:
        """Predict a unit's routes and divide it into two batches."""
        predictor, size = self.engine.predictor, -(-len(unit.rows) // 2)
        if len(unit.rows) <= self.batch_size:
            size = len(unit.rows)
        order, unit.wanted, prob_TLE = np.arange(len(unit.rows)), None, None
        if predictor is not None:
            rows = self._described(unit.rows, 1)
            prob_TLE = predictor.predict(np.array([row.ids[-1] for row in rows]), rows)
        if prob_TLE is not None and self.scheduler is not None and size < len(order):
            plan = self.scheduler.regroup(likeliest(prob_TLE, self.engine.layout.top_k), size)
            self.objective_before += plan.objective_before
            self.objective_after += plan.objective_after
            order = plan.order_X
        places = [part for part in (order[:size], order[size:]) if len(part)]
        unit.batches = [reindex(unit.rows, part) for part in places]
        if prob_TLE is not None:
            unit.wanted = [self.engine.named(prob_TLE[part]) for part in places]

    def _described(self, rows: Sequence[int], new: int) -> list[Row]:
        """With the ids where they lie: those of a row are never written again."""
        return [Row(self._keys[row], self._id_RM[row, : self._length[row]], new, self._prompt[row]) for row in rows]

    def _run(self, batch: Sequence[int], rows: Sequence[Row]) -> Tensor:
        """logits_BV of the last position of each row."""
        model, store = self.engine.model, self._store
        token_BL = torch.from_numpy(np.stack([row.ids[-row.num_new :] for row in rows])).long()
        new = token_BL.shape[1]
        store.select(batch, new)
        position_BL = store.length_R[list(batch)][:, None] + torch.arange(new)
        if self._fast is not None and not self._watch.is_watched:
            x_TD, _ = self._fast.hidden(token_BL.flatten(), position_BL.flatten(), *store.layout(new))
            store.advance(new)
            return self._fast.logits(x_TD[new - 1 :: new])
        context = ForwardContext(
            sequence_length=new,
            sequences=[row.key for row in rows],
            is_measured=False,
            refuses_nan=False,
            position_BL=position_BL,
            rotary=model.rotary(position_BL, model.embedding.weight.dtype),
            cache=store,
            token_BL=token_BL,
        )
        x_BLD = model.hidden(token_BL, context)
        store.advance(new)
        return model.logits(x_BLD[:, -1:], context, keep_L=torch.tensor([new - 1]))[:, -1]

    def _take(
        self, unit: _Unit, batch: Sequence[int], logits_BV: Tensor, config: SamplingConfig, generator: torch.Generator
    ) -> None:
        """Take the next tokens; sequences that have ended leave the unit."""
        for row, token in zip(batch, sample(logits_BV, config, generator).tolist(), strict=True):
            if token in config.stop:
                unit.rows.remove(row)
                continue
            self._id_RM[row, self._length[row]] = token
            self._length[row] += 1
            if self._length[row] - self._prompt[row] >= config.max_tokens:
                unit.rows.remove(row)


def _known(unit: _Unit, number: int, later: Sequence[_Unit]) -> list[list[Expert]] | None:
    """What the layers will want from a batch of the unit on, into the unit after it where its routes have been predicted by now."""
    if unit.wanted is None:
        return None
    batches = unit.wanted[number:]
    is_last = number + 1 == len(unit.batches)
    if is_last and later and (ready := later[0].ready) is not None and ready.done() and not ready.exception():
        batches = batches + (later[0].wanted or [])
    return [step for batch in batches for step in batch]
