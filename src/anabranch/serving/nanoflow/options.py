"""`find_pipeline`: the pipeline that an engine's steps run by: read from a file, or searched for the device that is here."""

import logging
from pathlib import Path

from anabranch.lm.decoder import Decoder
from anabranch.serving.config import ServingConfig
from anabranch.serving.planning.cost import TILE, Workload, estimate
from anabranch.serving.planning.hardware import Hardware
from anabranch.serving.planning.search import Pipeline, read_pipeline, search
from anabranch.serving.planning.shape import ModelShape, shape_of

logger = logging.getLogger(__name__)

# Mean tokens of prompts and answers that a search is for where no file says otherwise.
PROMPT, OUTPUT = 512, 256
BUDGET_S = 60.0


def find_pipeline(
    model: Decoder, config: ServingConfig, hardware: Hardware | None = None, *, budget_s: float = BUDGET_S
) -> Pipeline | None:
    """The pipeline for a model's steps; None, with a warning, where nano-batches will not pay.

    Args:
        model: the decoder that will run.
        config: the engine's; ``config.pipeline`` is read where it is a file, and written where it is not there yet.
        hardware: profile of the device; None measures it.
        budget_s: time for a search.

    Raises DataError if the file is no pipeline, ConfigError if it is for another model.
    """
    weight = model.embedding.weight
    shape = shape_of(model.config, weight_bytes=weight.element_size(), kv_bytes=weight.element_size())
    path = None if config.pipeline is None else Path(config.pipeline)
    if path is not None and path.exists():
        return read_pipeline(path, shape)
    if hardware is None:
        from anabranch.serving.planning.measure import measure

        hardware = measure(weight.device.type, dtype=weight.dtype)
    workload = Workload(prompt=PROMPT, output=OUTPUT, dense_batch=config.max_batched_tokens)
    why = _why_not(shape, hardware, workload)
    if why is not None:
        logger.warning("%s on %s, so splitting batches gains nothing; steps run whole", why, hardware.name)
        return None
    made = search(shape, hardware, workload, budget_s=budget_s)
    if path is not None:
        made.save(path)
    return made


def _why_not(shape: ModelShape, hardware: Hardware, workload: Workload) -> str | None:
    found = estimate(shape, hardware, workload)
    if not found.pays:
        return f"T_R is {found.t_r:.2f}"
    if workload.dense_batch < 2 * TILE:
        return f"steps of {workload.dense_batch} tokens are below two tiles"
    return None
