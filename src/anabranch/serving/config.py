"""`ServingConfig`: everything about an engine that can be said in a file or on a command line."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anabranch.config import Config, Field, Repeats, Seed, Size, configclass
from anabranch.errors import CapacityError, ConfigError
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.core.client import EngineClient
from anabranch.serving.core.kinds import most_new
from anabranch.serving.depth import DepthConfig
from anabranch.serving.experts import ExpertsConfig
from anabranch.serving.rewiring import RewiringConfig
from anabranch.sizes import parse_bytes

if TYPE_CHECKING:
    from anabranch.data.tokenizer import Tokenizer
    from anabranch.serving.engine.engine import Engine

Quantize = Literal["auto", "none", "stored", "int8", "int4", "nf4"]

# Does not go with ``context``.
_OF_ONE_PROCESS = (
    "memory",
    "nano_batches",
    "host_kv",
    "expert_budget",
    "experts",
    "deterministic",
    "max_depth",
    "num_streams",
    "depth",
    "adapters",
    "rewiring",
)
# Bytes of the key-value cache where nobody says.
DEFAULT_KV = "1GiB"


def blocks_in(kv_memory: str, bytes_per_token: int, block_tokens: int) -> int:
    """Blocks of a key-value cache of so many bytes. Raises CapacityError if not even one fits."""
    size, block = parse_bytes(kv_memory, "kv_memory"), bytes_per_token * block_tokens
    if size < block:
        raise CapacityError(f"kv_memory is {kv_memory}; a block of {block_tokens} tokens takes {block} bytes")
    return size // block


@configclass
class ServingConfig(Config):
    """How a model is loaded, how much memory it gets, and how its steps are formed.

    Attributes:
        model: a path as `anabranch.lm.load_model` takes it.
        name: what the model is called; empty for the last part of the path.
        dtype: of weights, keys and values; ``auto`` is bfloat16 where the processor or device multiplies it, else float32.
        quantize: bits of linear layers and experts. ``stored`` keeps those of a GGUF file, of GPTQ and of AWQ where there are kernels for
            them, and all else in floating point; ``none`` is floating point whatever is stored; ``int8`` and ``int4`` round what has more.
            ``auto`` is ``stored`` on a CPU with kernels, unless ``dtype`` says of which type weights are: then, and elsewhere, it is
            ``none``. A folder of ours that is saved in few bits stays in them. ``nf4`` is the base as adapters learned beside it
            (QLoRA, `anabranch.nn.nf4`): linear layers alone, made anew in each step and so slower than all others.
        device: where it runs.
        threads: of one step; None leaves PyTorch's choice.
        memory: bytes for everything: the program, weights, adapters, keys and values, and what a step takes. ``quantize``,
            ``expert_budget`` and ``kv_memory`` follow from it unless they are given, see `anabranch.serving.memory`; None leaves them as
            they are.
        kv_memory: bytes of the key-value cache, such as ``2GiB``; None for 1 GiB, or with ``memory`` a part of that.
        num_blocks: of the key-value cache, instead of ``kv_memory``; of layers with windows there may be fewer, see
            `anabranch.serving.engine.kinds`.
        block_tokens: tokens per block.
        max_positions: longest prompt and output together; None for the model's own limit.
        max_batched_tokens: tokens in a step.
        max_seqs: requests in a step.
        long_prefill_chunk: most tokens of one prompt in a step; None for all that fit.
        prefix_cache: keep keys and values of earlier requests for those that begin alike.
        prompt_lookup: most tokens guessed for a request in a step by looking up what followed where its last tokens stood before, and
            checked in that step (`anabranch.serving.core.lookup`): outputs stay what they are, and text that repeats comes sooner. Guesses
            take only what is left of ``max_batched_tokens``, and beside other requests there are no more of them in a step than requests
            that decode. 0 for none, 64 at most.
        prompt_lookup_ngram: most tokens that are looked up; where they stood nowhere fewer are, down to one.
        scheduling: ``async`` forms the next step while one runs; ``sync`` when it has ended; ``auto`` is ``sync`` on a CPU, whose cores
            the model needs itself, and with ``prompt_lookup``, and ``async`` elsewhere and with ``nano_batches``.
        nano_batches: run big steps as nano-operations side by side where that pays, see `anabranch.serving.nanoflow`.
        pipeline: file with the order and shares of nano-operations, as ``anabranch plan --search --out`` writes it; where it is not there
            yet it is searched for and written. None searches at each start.
        host_kv: bytes of main memory for keys and values that have no room in ``kv_memory``; None for none. With it, layers with a window
            keep whole sequences.
        disk_kv: bytes of a file behind that.
        admit_by_peak: let a request in only if all that run are expected to fit at their peak.
        expert_budget: bytes of expert weights kept in memory, such as ``2GiB``; None keeps them all.
        experts: how those of a budget come and go.
        deterministic: no output depends on what else is in a step, to the bit; slower, see `anabranch.serving.engine.steady`.
        watchdog_s: an engine that gives no sign of life for so many seconds, which no step should take, counts as dead and is started
            again; None waits for ever.
        process: the engine has a process of its own, so that neither a crash nor Python's lock reaches the front end.
        seed: of requests that bring none; None draws it.
        max_depth: most blocks that a request's own path may run; keys and values take room for as many, and layers with a window keep whole
            sequences. None for those of the model.
        pooling: how ``/v1/embeddings`` makes a vector of a text's states: of the ``last`` token, or their ``mean``; ``auto`` as the model's
            folder says (``1_Pooling/config.json`` of sentence-transformers), else the last, as Qwen3-Embedding does.
        num_streams: parallel streams of requests that do not say it, of a model that has them; None for the number it was saved with.
        depth: routers that choose which blocks a request runs, see there. With them, ``max_depth`` is twice the model's blocks where nobody
            says less.
        adapters: that requests may use, see there.
        context: keys and values are cut over so many processes, each with all weights, that `torch.distributed` has brought together
            (torchrun): for contexts that none has room for. ``kv_memory`` is of each. The first schedules and answers, the others `follow`.
        context_timeout_s: after which one of them that does not answer is given up, and the engine with it.
        rewiring: of requests that ask for it, see there.
    """

    model: str = ""
    name: str = ""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantize: Quantize = "auto"
    device: str = "cpu"
    threads: Repeats | None = Field(default=None, ge=1)
    memory: str | None = None
    kv_memory: str | None = None
    num_blocks: Size | None = Field(default=None, ge=1)
    block_tokens: Size = Field(default=16, ge=1)
    max_positions: Size | None = Field(default=None, ge=2)
    max_batched_tokens: Size = Field(default=512, ge=1)
    max_seqs: Size = Field(default=16, ge=1)
    long_prefill_chunk: Size | None = Field(default=None, ge=1)
    prefix_cache: bool = True
    prompt_lookup: int = Field(default=0, ge=0, le=64)
    prompt_lookup_ngram: int = Field(default=3, ge=1, le=64)
    scheduling: Literal["auto", "async", "sync"] = "auto"
    nano_batches: bool = False
    pipeline: str | None = None
    host_kv: str | None = None
    disk_kv: str | None = None
    admit_by_peak: bool = False
    expert_budget: str | None = None
    experts: ExpertsConfig = ExpertsConfig()
    deterministic: bool = False
    watchdog_s: float | None = Field(default=120.0, gt=0)
    process: bool = True
    seed: Seed | None = None
    max_depth: Repeats | None = Field(default=None, ge=1)
    pooling: Literal["auto", "last", "mean"] = "auto"
    num_streams: Repeats | None = Field(default=None, ge=1)
    depth: DepthConfig = DepthConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    context: Repeats | None = Field(default=None, ge=1)
    context_timeout_s: float = Field(default=60.0, gt=0)
    rewiring: RewiringConfig = RewiringConfig()

    @property
    def is_async(self) -> bool:
        """Whether the next step is formed while one runs."""
        is_better = self.nano_batches or not self.device.startswith("cpu")
        is_fit = is_better and self.experts.dual_batch is None and not self.prompt_lookup
        return self.scheduling == "async" or (self.scheduling == "auto" and is_fit)

    @property
    def num_new(self) -> int:
        """Tokens of one request that steps under way, and the one that is formed, compute at most."""
        return most_new(self.max_batched_tokens, self.long_prefill_chunk, self.prompt_lookup, is_async=self.is_async)

    def __post_init__(self) -> None:
        for name in ("memory", "kv_memory", "expert_budget", "host_kv", "disk_kv"):
            if getattr(self, name) is not None:
                parse_bytes(getattr(self, name), name)
        if self.memory is not None and self.expert_budget is not None:
            if parse_bytes(self.expert_budget) >= parse_bytes(self.memory):
                raise ConfigError(
                    f"expert_budget is {self.expert_budget}, and memory, which is for everything, is {self.memory}; give experts less, or "
                    "leave one of them out"
                )
        if self.pipeline is not None and not self.nano_batches:
            raise ConfigError("pipeline is set, but nano_batches is not; only nano-operations run by a pipeline")
        if self.disk_kv is not None and self.host_kv is None:
            raise ConfigError("disk_kv is set, but host_kv is not; blocks reach the disk by way of main memory")
        self._check_experts()
        self._check_lookup()
        self._check_rewiring()
        self._check_nf4()
        self._check_context()

    def _check_context(self) -> None:
        """What is of one process does not go with several."""
        if self.context is None:
            return
        plain = ServingConfig()
        for name in _OF_ONE_PROCESS:
            if getattr(self, name) != getattr(plain, name):
                raise ConfigError(f"context is {self.context}, but {name} is for one process; leave one of them out")

    def _check_experts(self) -> None:
        self.experts.check_budget(self.expert_budget is not None or self.memory is not None)
        pair = self.experts.dual_batch
        if pair is not None and pair >= self.max_seqs:
            raise ConfigError(
                f"experts.dual_batch is {pair}, but a step has at most max_seqs={self.max_seqs} requests, so there are never two batches"
            )
        if pair is not None and (self.scheduling == "async" or self.nano_batches):
            other = "nano_batches" if self.nano_batches else "scheduling='async'"
            raise ConfigError(
                f"experts.dual_batch is {pair}, which needs each step's tokens before the next one is formed; leave {other} out"
            )

    def _check_lookup(self) -> None:
        if not self.prompt_lookup:
            if self.prompt_lookup_ngram != ServingConfig.prompt_lookup_ngram:
                raise ConfigError(
                    f"prompt_lookup_ngram is {self.prompt_lookup_ngram}, but prompt_lookup is 0, so nothing is looked up; set both or none"
                )
            return
        others = {
            "scheduling='async'": (
                self.scheduling == "async",
                "needs each step's tokens before the next one is formed",
            ),
            "nano_batches": (self.nano_batches, "needs each step's tokens before the next one is formed"),
            "expert_budget": (self.expert_budget is not None, "would load experts for guesses that do not hold"),
        }
        for name, (is_set, why) in others.items():
            if is_set:
                raise ConfigError(f"prompt_lookup is {self.prompt_lookup}, which {why}; leave {name} out")

    def _check_nf4(self) -> None:
        if self.quantize != "nf4":
            return
        for name, is_set in (("memory", self.memory is not None), ("expert_budget", self.expert_budget is not None)):
            if is_set:
                raise ConfigError(
                    f"quantize is 'nf4', which keeps experts whole and in memory, and {name} is set; set quantize to int4, or leave {name} "
                    "out"
                )

    def _check_rewiring(self) -> None:
        if not self.rewiring.on:
            return
        others = {
            "memory": (self.memory is not None, "it plans for no gradients"),
            "expert_budget": (
                self.expert_budget is not None,
                "experts that come and go belong to the engine's own steps",
            ),
            "nano_batches": (self.nano_batches, "its operations know no routing of single requests"),
            "prompt_lookup": (
                bool(self.prompt_lookup),
                "nothing is guessed in steps in which requests are routed otherwise",
            ),
            "num_streams": (
                self.num_streams is not None,
                "vectors are fitted with the streams that the model was saved with",
            ),
            "depth.skipper": (
                self.depth.skipper is not None,
                "requests are routed row by row, and it changes the rows",
            ),
        }
        for name, (is_set, why) in others.items():
            if is_set:
                raise ConfigError(f"rewiring.on is set, which does not go with {name}: {why}; leave one of them out")

    def planned(self, beside: int = 0) -> "ServingConfig":
        """With what ``memory`` means in its place, see `anabranch.serving.memory.plan_memory`; itself without it.

        ``beside`` so many bytes of it are for something else.

        Raises CapacityError if the model does not fit, with the least that would do; ConfigError, CheckpointError or BackendError as that.
        """
        if self.memory is None:
            return self
        from anabranch.serving.memory import plan_memory

        return plan_memory(self, beside=beside).check().config

    def found(self) -> "ServingConfig":
        """With the very folder or file that ``model`` means, and of a training run, of which that is the newest checkpoint, its name.

        Who loads by it, at any time and in any process, has the same model, whatever is written to the run meanwhile.

        Raises CheckpointError if there is none.
        """
        from anabranch.lm.checkpoint import find_model

        place = find_model(self.model)
        if place == Path(self.model):
            return self
        return self.replace(model=str(place), name=self.name or Path(self.model).name or "model")

    def engines(self) -> Callable[[], EngineClient]:
        """Makes an engine's client, not started, and then others in its place, see `AdaptersConfig.versions`."""
        last: Any = None
        config = self

        def make() -> EngineClient:
            nonlocal last, config
            if last is not None and last.info is not None:
                # A plan for adapters as they are by now might have other bits, or no room.
                config = last.info.planned or config
                config = config.replace(adapters=config.adapters.replace(versions=last.info.adapter_versions))
            last = config.build()
            return last

        return make

    def build(self, *args: Any, **kwargs: Any) -> EngineClient:
        """The engine's client, not started."""
        from anabranch.serving.engine.local import LocalEngine
        from anabranch.serving.engine.process import ProcessEngine

        kwargs.setdefault("watchdog_s", self.watchdog_s)
        # The process that torchrun has started is the one that is in the group.
        is_apart = self.process and self.context is None
        return (ProcessEngine if is_apart else LocalEngine)(self.make_engine, *args, **kwargs)

    def follow(self) -> None:
        """Load the model and run what the first of ``context`` processes says, until that ends; in every other process.

        Raises PeerError where the first goes away without a word, and as `load`.
        """
        self.make_engine().runner.follow()

    def make_engine(self) -> "Engine":
        """Load the model and make the engine, in this thread."""
        return self.load()[0]

    def load(self) -> "tuple[Engine, Tokenizer | None]":
        """The engine, and the model's tokenizer.

        Raises CheckpointError, ConfigError, CapacityError or BackendError if it cannot be.
        """
        from anabranch.serving.load import load

        return load(self)

    def blocks_for(self, bytes_per_token: int) -> int:
        """Blocks of the key-value cache for a model that keeps so much per position. Raises CapacityError if not even one fits."""
        if self.num_blocks is not None:
            return self.num_blocks
        return blocks_in(self.kv_memory or DEFAULT_KV, bytes_per_token, self.block_tokens)
