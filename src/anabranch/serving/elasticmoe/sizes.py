"""What follows from a model and the settings of its group: limits of a rank, what a front end is told, bytes of a cache, whose memory."""

from pathlib import Path

from anabranch.data.tokenizer import load_tokenizer
from anabranch.errors import ConfigError
from anabranch.lm.checkpoint import load_config
from anabranch.lm.tensors import build_empty
from anabranch.serving.answering import answer_settings
from anabranch.serving.core.client import EngineInfo
from anabranch.serving.depth import room_for_paths
from anabranch.serving.elasticmoe.backend import Backend, backend_of
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.layout import Layout
from anabranch.serving.elasticmoe.mapped import padded
from anabranch.serving.elasticmoe.rank_boot import Limits
from anabranch.serving.engine.paged import PagedShape
from anabranch.serving.load import check_depth

__all__ = ["backend_for", "sizes_of"]


def sizes_of(config: ElasticConfig, layout: Layout) -> tuple[Limits, EngineInfo, int]:
    """(limits of a rank, what is served, bytes of the key-value cache of a device). Raises CheckpointError."""
    folder = Path(layout.folder)
    check_depth(config.depth, str(folder))
    routes, prunes = config.depth.routers is not None, config.depth.skipper is not None
    model = load_config(folder)
    stops = config.stop_tokens
    if stops is None:
        stops = tuple(load_tokenizer(folder).stop_ids) if (folder / "tokenizer.json").is_file() else ()
    built = build_empty(model).eval()
    max_depth = room_for_paths(config.max_depth, model.num_layers, routes=routes)
    shape = PagedShape.of(built, max_depth)
    if shape.value_width is not None:
        raise ConfigError(
            f"{folder} keeps compressed keys that hold the values too (multi-head latent attention), which several devices do not "
            "yet; serve it on one"
        )
    max_positions = min(config.max_positions or model.max_positions, model.max_positions)
    num_blocks = config.blocks_for(shape.bytes_per_token, max_positions)
    limits = Limits(
        num_blocks=num_blocks,
        block_tokens=config.block_tokens,
        max_positions=max_positions,
        max_batched_tokens=config.max_batched_tokens,
        max_seqs=config.max_seqs,
        long_prefill_chunk=config.long_prefill_chunk,
        threads=config.threads,
        prefix_cache=config.prefix_cache,
        stop_tokens=stops,
        seed=config.seed,
        max_depth=max_depth,
        pace_s=config.pace_s,
        pace_token_s=config.pace_token_s,
    )
    info = EngineInfo(
        # As one engine would be called: by what was given, not by the checkpoint found there.
        model=config.name or Path(config.model).name or "model",
        vocab_size=model.vocab_size,
        max_positions=min(max_positions, num_blocks * config.block_tokens),
        block_tokens=config.block_tokens,
        num_blocks=num_blocks,
        stop_tokens=stops,
        routed_layers=dict(enumerate(layout.num_experts)),
        num_streams=built.streams_of(None)[0],
        stream_choices=model.stream_choices,
        num_layers=model.num_layers,
        max_depth=None if max_depth is None else shape.layers,
        routes_depth=routes,
        skips_tokens=prunes,
        depth=config.depth.usually(routes=routes, prunes=prunes),
        # Devices compute in what is stored.
        numbers=f"{' '.join(layout.dtypes)} stored",
        settings=answer_settings(config),
    )
    size = num_blocks * config.block_tokens * shape.bytes_per_token
    return limits, info, 2 * padded(size // 2, layout.page)


def backend_for(config: ElasticConfig) -> Backend:
    """The backend of a group's devices. Raises BackendError where there are none, ConfigError for several that cannot share."""
    backend = backend_of(config.device)
    if config.weights == "shared" and min(backend.num_memories, config.policy.max_devices) > 1:
        raise ConfigError(
            f"weights is 'shared', but the devices are on {backend.num_memories} GPUs, and each needs weights in its own memory: "
            "set weights='own' (device_weights of a server), or show one GPU alone (CUDA_VISIBLE_DEVICES=0)"
        )
    return backend
