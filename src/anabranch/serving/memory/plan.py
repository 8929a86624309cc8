"""`plan_memory`: the first rung of a ladder on which a model fits into so much memory.

    1. all weights in memory, as they are stored or in the type that they are served in
    2. all in memory, in int8
    3. all in memory, in int4
    4. experts on disk in the fewest bits they can be in, with a budget of what is left beside everything else

Bits are not given up for keys and values: a rung fits where `FEW` requests of `LEAST_POSITIONS` still have room for theirs, or less where
that is more than an eighth of the memory or than all requests can fill. The last rung may take that down to one such request. What the
config says itself (``quantize``, ``expert_budget``, ``kv_memory``, ``num_blocks``) stays, and the rest is
planned around it; ``experts`` stays where they are on disk, and says nothing where they are not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from anabranch.errors import CapacityError, ConfigError
from anabranch.lm.checkpoint import find_model, open_model, quantization_of
from anabranch.lm.decoder import Decoder
from anabranch.lm.quantized import has_few_bits, makes_experts
from anabranch.lm.tensors import SafetensorsFiles, has_weights
from anabranch.nn.quantize import QuantizedPool
from anabranch.serving.config import DEFAULT_KV, Quantize, ServingConfig
from anabranch.serving.experts import ExpertsConfig
from anabranch.serving.load import dtype_of, quantize_of
from anabranch.serving.memory.adapters import adapter_bytes
from anabranch.serving.memory.forms import Form
from anabranch.serving.memory.program import program_bytes
from anabranch.serving.memory.work import FLOAT, READ_BYTES, load_bytes, step_bytes
from anabranch.sizes import parse_bytes

__all__ = ["LEAST_POSITIONS", "Ladder", "MemoryPlan", "plan_memory"]

# One request of so many tokens can always run, or of the model's own limit.
LEAST_POSITIONS = 4096

# Requests of so many tokens that a rung still serves well, see above.
FEW = 4

# Times the bytes of an expert, that there are while it is made of what a file stores.
MAKING = 8

# Of the memory, that keys and values get at most before bits of weights do.
KV_SHARE = 8


@dataclass(frozen=True)
class MemoryPlan:
    """How a model is served in so much memory. Sizes are in bytes.

    Attributes:
        config: what to serve it with: ``quantize``, ``expert_budget`` and ``kv_memory`` in place of ``memory``.
        memory: what there is.
        rest: weights beside experts, in memory.
        experts: all experts, in the bits they are served in.
        resident: of them, in memory at a time.
        kv: keys and values.
        work: what a step takes beside all this, or loading does, whichever is more; a bound.
        program: interpreters and libraries of all processes, tokenizers too; measured.
        adapters: those that requests may use, which all stay in memory.
        disk: of the cache folder, for experts that are rounded when the engine starts; 0 where they are read from the model's own files.
        least: memory that would do for this model, on its last rung.
    """

    config: ServingConfig
    memory: int
    rest: int
    experts: int
    resident: int
    kv: int
    work: int
    program: int
    disk: int
    least: int
    adapters: int = 0

    @property
    def total(self) -> int:
        """The most that is in memory at a time."""
        return self.rest + self.resident + self.kv + self.work + self.program + self.adapters

    @property
    def fits(self) -> bool:
        """Whether that is no more than there is."""
        return self.total <= self.memory

    @property
    def resident_share(self) -> float | None:
        """Of the experts' bytes; None without experts."""
        return self.resident / self.experts if self.experts else None

    def check(self) -> "MemoryPlan":
        """Itself. Raises CapacityError, with the least memory that would do, if it does not fit."""
        if not self.fits:
            beside = f", {self.adapters:,} for adapters" if self.adapters else ""
            raise CapacityError(
                f"memory is {self.memory:,} bytes, and {self.config.model} takes at least {self.least:,}: {self.program:,} for the "
                f"program, {self.work:,} for steps, {self.rest:,} for weights beside experts, {self.resident:,} for experts, "
                f"{self.kv:,} for keys and values{beside}"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        config = self.config
        return {
            "model": config.model,
            "memory": self.memory,
            "fits": self.fits,
            "least_memory": self.least,
            "quantize": config.quantize,
            "expert_budget": None if config.expert_budget is None else parse_bytes(config.expert_budget),
            "kv_memory": self.kv,
            "bytes": {
                "rest": self.rest,
                "experts": self.resident,
                "kv": self.kv,
                "work": self.work,
                "program": self.program,
                **({"adapters": self.adapters} if self.adapters else {}),
            },
            "total_bytes": self.total,
            "all_expert_bytes": self.experts,
            "resident_share": self.resident_share,
            "disk_bytes": self.disk,
        }


def plan_memory(
    config: ServingConfig,
    *,
    shape: Decoder.Config | None = None,
    measure: Callable[..., int] | None = None,
    beside: int = 0,
) -> MemoryPlan:
    """How to serve the model of ``config`` in ``config.memory``. No weights are read; `MemoryPlan.check` tells whether it fits.

    Args:
        config: ``memory`` must be set.
        shape: of the model, where there is no folder or file of it.
        measure: `program_bytes`, or what stands for it.
        beside: bytes that a step takes for what an engine does not do, such as logits of whole texts.

    Raises:
        ConfigError: ``memory`` together with what it does not go with.
        CheckpointError, BackendError: as `anabranch.lm.load_config`.
    """
    if config.memory is None:
        raise ConfigError("memory is None; give a size such as 8GiB")
    return Ladder(config, shape, measure, beside=beside).plan(parse_bytes(config.memory, "memory"))


class Ladder:
    """What of a plan does not depend on how much memory there is. Arguments and errors as `plan_memory`."""

    def __init__(
        self,
        config: ServingConfig,
        shape: Decoder.Config | None = None,
        measure: Callable[..., int] | None = None,
        *,
        beside: int = 0,
    ) -> None:
        if not config.device.startswith("cpu"):
            raise ConfigError(
                f"memory is {config.memory} and device is {config.device!r}; only the memory of a CPU is planned, leave one of them out"
            )
        self.config, self.beside = config, beside
        self.model: str | Decoder.Config = config.model if shape is None else shape
        self.found = None if shape is not None else find_model(config.model)
        self.resident, self.on_disk = self._rungs()
        self.adapters = adapter_bytes(config, self.model)
        self.program = (measure or program_bytes)(config.model, processes=2 if config.process else 1)

    def plan(self, memory: int) -> MemoryPlan:
        """The first rung that fits into so many bytes, else the one that takes least."""
        made = [self._in_memory(memory, form, self._kv_few(memory, form)) for form in self.resident]
        # Of experts on disk it is their budget that pays for keys; of a budget that is given it is bits again.
        if self.config.expert_budget is None:
            made += [self._on_disk(memory, form, self._kv_share(memory, form)) for form in self.on_disk]
        made += [self._on_disk(memory, form, self._kv_few(memory, form)) for form in self.on_disk]
        made += [self._on_disk(memory, form, self._kv_least(form)) for form in self.on_disk]
        # Where no experts can go, or rounding takes more than it saves, there still is the share of keys and values to give up.
        made += [self._in_memory(memory, form, self._kv_least(form)) for form in self.resident]
        least = min(one.least for one in made)
        best = next((one for one in made if one.fits), None) or min(made, key=lambda one: one.total)
        return replace(best, least=least)

    def _rungs(self) -> tuple[list[Form], list[Form]]:
        """Forms with all in memory, and forms with experts on disk, in the order in which they are tried."""
        config = self.config
        found: list[Form] = []
        for quantize in self._bits():
            form = self._form(quantize)
            # What is stored in few bits may take no less in others.
            if form is not None and (not found or form.bytes < found[-1].bytes):
                found.append(form)
        on_disk = [form for form in found if self._can_stay_on_disk(form)]
        if config.expert_budget is None:
            return found, on_disk[-1:]
        if not on_disk:
            raise ConfigError(
                f"expert_budget is {config.expert_budget}, but {config.model} has no experts that can stay on disk; leave it out, "
                "or memory, which plans for no budget of the adapters of a mixture"
            )
        return [], on_disk

    def _bits(self) -> Sequence[Quantize]:
        """Kinds of weights, the one with the most digits first."""
        if self.config.quantize != "auto":
            return (self.config.quantize,)
        if self.found is not None and quantization_of(self.found) is not None:
            return ("none",)
        stored = None if self.found is None or not has_few_bits(self.found) else self._form("stored")
        if stored is None or not stored.is_few_bits:
            return ("none", "int8", "int4")
        # As without a limit, see `quantize_of`, where that fits.
        return (
            ("stored", "int8", "int4") if quantize_of(self.config) == "stored" else ("none", "stored", "int8", "int4")
        )

    def _form(self, quantize: Quantize) -> Form | None:
        try:
            return Form.of(self.model, quantize, dtype_of(self.config))
        except ConfigError:
            # No layer can be in these bits.
            if quantize in ("none", "stored") or self.config.quantize != "auto":
                raise
            return None

    def _can_stay_on_disk(self, form: Form) -> bool:
        # Guesses would load experts for nothing, see `ServingConfig`.
        if form.pools is None or self.config.prompt_lookup:
            return False
        if form.quantize in ("int8", "int4"):
            return all(isinstance(pool, QuantizedPool) for pool in form.pools.pools)
        if self.found is None or self.found.is_file() or not has_weights(self.found):
            return True
        is_read = form.is_few_bits or isinstance(open_model(self.found).source, SafetensorsFiles)
        return is_read or makes_experts(self.found, None)

    # one rung

    def _in_memory(self, memory: int, form: Form, kv: int) -> MemoryPlan:
        """All weights in memory, with at least ``kv`` bytes for keys and values."""
        made = self._made(memory, form, form.experts, kv, on_disk=False)
        more = min(self._left(made, form, on_disk=False), self._kv_most(form) - kv)
        # What is left goes to keys and values, as far as they may want it.
        if more > 0 and not self._is_kv_given:
            made = self._made(memory, form, form.experts, kv + more, on_disk=False)
        return replace(made, least=self._made(memory, form, form.experts, self._kv_least(form), on_disk=False).total)

    def _on_disk(self, memory: int, form: Form, kv: int) -> MemoryPlan:
        """Experts on disk, with a budget of what is left beside ``kv`` bytes for keys and values; these get what a given one leaves."""
        smallest = form.least_budget or 0
        given = self.config.expert_budget
        resident = smallest if given is None else parse_bytes(given, "expert_budget")
        if resident < smallest:
            raise ConfigError(
                f"expert_budget is {given}, but experts of one token in one layer take {smallest:,} bytes; give at least that"
            )
        resident = min(resident, form.experts)
        least = self._made(memory, form, resident, self._kv_least(form), on_disk=True).total
        made = self._made(memory, form, resident, kv, on_disk=True)
        left = self._left(made, form, on_disk=True)
        if left > 0 and given is None:
            made = self._made(memory, form, min(resident + left, form.experts), kv, on_disk=True)
        elif left > 0 and not self._is_kv_given:
            made = self._made(memory, form, resident, min(kv + left, max(self._kv_most(form), kv)), on_disk=True)
        return replace(made, least=least)

    def _made(self, memory: int, form: Form, resident: int, kv: int, *, on_disk: bool) -> MemoryPlan:
        config = self.config
        is_rounded, is_written = form.quantize != "none", on_disk and form.quantize in ("int8", "int4")
        step = self._step(form, on_disk=on_disk)
        # Slots of experts, keys and values are not written before all else is there.
        later = kv + (resident if on_disk else 0)
        # Adapters are read when the model is there, and no step runs yet.
        reading = self.adapters.reading
        work = max(step, load_bytes(form, is_rounded=is_rounded, on_disk=on_disk) - later, reading)
        changes: dict[str, Any] = {"memory": None, "quantize": form.quantize}
        if on_disk and config.expert_budget is None:
            changes["expert_budget"] = f"{resident}B"
        if not on_disk:
            # What is said of experts on disk is for the rungs that have them.
            changes["experts"] = ExpertsConfig()
        if not self._is_kv_given:
            changes["kv_memory"] = f"{kv}B"
        return MemoryPlan(
            config.replace(**changes),
            memory=memory,
            rest=form.rest,
            experts=form.experts,
            resident=resident,
            kv=kv,
            work=work,
            program=self.program,
            disk=form.experts if is_written else 0,
            least=0,
            adapters=self.adapters.held,
        )

    def _step(self, form: Form, *, on_disk: bool) -> int:
        """What a step takes. Routers and skippers see a prompt whole before its first piece, however many tokens a step has."""
        config, positions = self.config, self._positions(form)
        sees_whole = config.depth.routers is not None or config.depth.skipper is not None
        step = self.beside + step_bytes(
            form,
            max(config.max_batched_tokens, positions * sees_whole),
            config.max_seqs,
            positions,
            prompt_lookup=config.prompt_lookup,
            workers=config.experts.workers if on_disk else 0,
            is_adapted=bool(self.adapters.held),
        )
        # A model in NF4 is not planned for, and "auto" was settled before.
        bits = (
            form.quantize if form.quantize == "stored" or form.quantize == "int8" or form.quantize == "int4" else None
        )
        if on_disk and self.found is not None and makes_experts(self.found, bits):
            step += READ_BYTES + MAKING * max(form.pools.layout.bytes_of_kind if form.pools is not None else (0,))
        if config.depth.skipper is None:
            return step
        # What it computes is kept until the last piece, of one prompt at a time, and there is the one that runs.
        from anabranch.depth.ftp.attention_scores import ELEMENTS

        kinds, attention = form.kinds(config), cast(Any, form.model.config.attention)
        kept = 2 * (kinds.bytes_of(kinds.needed(positions)) + FLOAT * form.model.config.dim * positions)
        # And to see how much attention a token gets it looks at weights of many queries at a time, once as scores and once as weights.
        looked_at = min(max(ELEMENTS, positions), positions * positions)
        return step + kept + 2 * FLOAT * attention.num_heads * looked_at

    def _left(self, made: MemoryPlan, form: Form, *, on_disk: bool) -> int:
        """Bytes that slots, or keys and values, can have beside what they have in a plan; 0 for one that does not fit.

        What loading takes, if it is that which the plan counts as work, is free again when these are written.
        """
        free_then = made.work - self._step(form, on_disk=on_disk)
        return made.memory - made.total + free_then if made.fits else 0

    # keys and values

    @property
    def _is_kv_given(self) -> bool:
        return self.config.kv_memory is not None or self.config.num_blocks is not None

    def _positions(self, form: Form) -> int:
        """Of the longest request."""
        most = form.model.config.max_positions
        return min(self.config.max_positions or most, most)

    def _kv_least(self, form: Form) -> int:
        """For one request of `LEAST_POSITIONS`, or what was given; main memory behind it counts too."""
        config, kinds = self.config, form.kinds(self.config)
        behind = 0 if config.host_kv is None else parse_bytes(config.host_kv, "host_kv")
        if config.num_blocks is not None:
            return behind + kinds.bytes_of(config.num_blocks)
        if config.kv_memory is not None:
            return behind + parse_bytes(config.kv_memory, "kv_memory")
        return behind + kinds.bytes_of(kinds.needed(min(self._positions(form), LEAST_POSITIONS)))

    def _kv_most(self, form: Form) -> int:
        """The usual, or as much as all requests of a step can fill."""
        kinds = form.kinds(self.config)
        filled = kinds.bytes_of(kinds.needed(self._positions(form), self.config.max_seqs))
        return max(min(parse_bytes(DEFAULT_KV), filled), self._kv_least(form))

    def _kv_few(self, memory: int, form: Form) -> int:
        """For `FEW` requests of `LEAST_POSITIONS`, where that is no more than the share."""
        kinds, positions = form.kinds(self.config), min(self._positions(form), LEAST_POSITIONS)
        few = kinds.bytes_of(kinds.needed(positions, min(FEW, self.config.max_seqs)))
        return max(min(few, self._kv_share(memory, form)), self._kv_least(form))

    def _kv_share(self, memory: int, form: Form) -> int:
        """An eighth of the memory, where all requests can fill it."""
        if self._is_kv_given:
            return self._kv_least(form)
        return max(min(memory // KV_SHARE, self._kv_most(form)), self._kv_least(form))
