"""`NanoFlowConfig`: NanoFlow's choices for an engine in one place, and the arguments of `Engine.of` that they mean."""

import logging
from pathlib import Path
from typing import Any, Literal

import torch

from anabranch.config import Config, Field, configclass
from anabranch.lm.decoder import Decoder
from anabranch.serving.config import ServingConfig, parse_bytes
from anabranch.serving.core.offload import LruTier, PeakMemory
from anabranch.serving.engine.paged import PagedShape
from anabranch.serving.nanoflow.cost import TILE, Workload, estimate
from anabranch.serving.nanoflow.hardware import Hardware
from anabranch.serving.nanoflow.offload import TieredPool
from anabranch.serving.nanoflow.runtime import NanoRunner
from anabranch.serving.nanoflow.search import Pipeline, load_pipeline, search
from anabranch.serving.nanoflow.shape import shape_of

logger = logging.getLogger(__name__)


@configclass
class NanoFlowConfig(Config):
    """What of NanoFlow an engine uses.

    Attributes:
        overlap: ``off``: a step is scheduled when the last has ended; ``async``: while it runs; ``nano``: and big steps run as
            nano-operations, where T_R is at most 1.
        dense_batch: tokens of a step; None leaves `ServingConfig.max_batched_tokens`.
        prompt: mean tokens of a prompt, for the search.
        output: mean tokens of an answer, for the search and for admission.
        search_budget_s: time for the search.
        pipeline: file that a pipeline is read from if it fits, else written to.
        host_kv: bytes of main memory for keys and values that have no room, such as ``2GiB``; None for none.
        disk_kv: bytes of a file behind that.
        folder: where the file is made.
        is_eager: save blocks when they are full, not only when they are evicted.
        admit_by_peak: let a request in only if all that run are expected to fit at their peak.
    """

    overlap: Literal["off", "async", "nano"] = "async"
    dense_batch: int | None = Field(default=None, ge=1)
    prompt: float = Field(default=512, ge=1)
    output: float = Field(default=256, ge=1)
    search_budget_s: float = Field(default=60.0, ge=0)
    pipeline: str | None = None
    host_kv: str | None = None
    disk_kv: str | None = None
    folder: str | None = None
    is_eager: bool = False
    admit_by_peak: bool = False

    def __post_init__(self) -> None:
        for name in ("host_kv", "disk_kv"):
            if getattr(self, name) is not None:
                parse_bytes(getattr(self, name), name)

    def engine(
        self, model: Decoder, serving: ServingConfig, hardware: Hardware | None = None
    ) -> tuple[ServingConfig, dict[str, Any]]:
        """The serving config as this one changes it, and further arguments of `Engine.of`.

        Args:
            model: the decoder that will run.
            serving: the engine's config.
            hardware: profile of its device; with ``overlap="nano"`` None measures it.

        Raises CapacityError if not even one block of keys and values fits where they are to go.
        """
        changes: dict[str, Any] = {"scheduling": "sync" if self.overlap == "off" else "async"}
        if self.dense_batch is not None:
            changes["max_batched_tokens"] = self.dense_batch
        serving = serving.replace(**changes)
        arguments: dict[str, Any] = {}
        shape = PagedShape.of(model, serving.max_depth)
        num_blocks = serving.blocks_for(shape.bytes_per_token)
        if self.admit_by_peak:
            arguments["memory"] = PeakMemory(num_blocks * serving.block_tokens, mean_output=self.output)
        if self.host_kv is not None:
            arguments |= self._offload(shape, num_blocks, serving.block_tokens, model.embedding.weight.device)
        if self.overlap == "nano":
            pipeline = self._pipeline(model, serving.max_batched_tokens, hardware)
            if pipeline is not None:

                def make_runner(*given: Any, **options: Any) -> NanoRunner:
                    return NanoRunner(*given, pipeline=pipeline, **options)

                arguments["make_runner"] = make_runner
        return serving, arguments

    def _offload(self, shape: PagedShape, num_blocks: int, block_tokens: int, device: torch.device) -> dict[str, Any]:
        assert self.host_kv is not None
        host = shape.blocks_in(parse_bytes(self.host_kv, "host_kv"), block_tokens)
        disk = 0 if self.disk_kv is None else shape.blocks_in(parse_bytes(self.disk_kv, "disk_kv"), block_tokens)
        pool = TieredPool(
            shape,
            num_blocks,
            host_blocks=host,
            disk_blocks=disk,
            folder=self.folder,
            block_tokens=block_tokens,
            device=device,
        )
        return {"pool": pool, "tier": LruTier(pool.num_slots, is_eager=self.is_eager)}

    def _pipeline(self, model: Decoder, dense_batch: int, hardware: Hardware | None) -> Pipeline | None:
        """The pipeline for steps of this size; None, with a warning, where nano-batches will not pay."""
        weight = model.embedding.weight
        if hardware is None:
            from anabranch.serving.nanoflow.measure import measure

            hardware = measure(str(weight.device), dtype=weight.dtype)
        shape = shape_of(model.config, weight_bytes=weight.element_size(), kv_bytes=weight.element_size())
        workload = Workload(prompt=self.prompt, output=self.output, dense_batch=dense_batch)
        found = estimate(shape, hardware, workload)
        if not found.pays or dense_batch < 2 * TILE:
            why = f"T_R is {found.t_r:.2f}" if not found.pays else f"steps of {dense_batch} tokens are below two tiles"
            logger.warning(
                "%s on %s, so nano-batches will not pay; steps run whole, scheduled asynchronously", why, hardware.name
            )
            return None
        if self.pipeline is not None and Path(self.pipeline).exists():
            known = load_pipeline(self.pipeline, shape, hardware, workload)
            if known is not None:
                return known
        made = search(shape, hardware, workload, budget_s=self.search_budget_s)
        if self.pipeline is not None:
            made.save(self.pipeline)
        return made
