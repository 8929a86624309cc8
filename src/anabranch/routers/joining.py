"""A model joins routers that are fitted already: what they learned of the others stays as it is.

router = joined(FittedRouter.load("routers/graph.safetensors"), Model(name="newcomer", price=price), outcomes)
router.save("routers/graph.safetensors")

Which routers can, and what they need for it, says their predictor (`Predictor.join`): ``graph`` takes a model by its description and
price alone, ``irt`` and ``coe`` need outcomes of it.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from anabranch.errors import InputError
from anabranch.files import atomic_write_json, parse_json
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model
from anabranch.routers.embed import unit_vectors
from anabranch.routers.fitted import MANIFEST, FittedRouter


def joined(router: FittedRouter, model: Model, outcomes: Recorded | None = None) -> FittedRouter:
    """A router that knows a further model. Its strategy is that of ``router``, which is changed.

    Args:
        router: fitted.
        model: with its price, and what it is good at.
        outcomes: that hold a column of it; None for none.

    Raises InputError for a router that takes none, one that knows the model, or one that needs outcomes of it.
    """
    shots = None if outcomes is None else outcomes_of(outcomes, model.name)
    if shots is not None and router.embedder is not None:
        shots = shots.with_vectors(unit_vectors(router.embedder, shots.query))
    router.strategy.join(model, shots)
    return replace(router, models=(*(one for one in router.models if one.name != model.name), model))


def outcomes_of(outcomes: Recorded, name: str) -> Recorded:
    """The rows that hold a score of a model, without the others. Raises InputError if none does."""
    if name not in outcomes.models:
        raise InputError(f"the outcomes hold nothing of {name!r}; they are of {', '.join(outcomes.models)}")
    own = outcomes.only([name])
    rows = np.flatnonzero(np.isfinite(own.score_NM[:, 0]))
    if not len(rows):
        raise InputError(f"the outcomes hold no score of {name!r}")
    return own.take(rows)


def save_joined(router: FittedRouter, path: Path) -> None:
    """Write it over the file that it was read from; the list of its folder knows the new model too."""
    router.save(path)
    manifest = path.parent / MANIFEST
    if not manifest.is_file():
        return
    content = parse_json(manifest.read_text(encoding="utf-8"))
    if isinstance(content, dict) and isinstance(content.get("models"), list):
        names = [*content["models"], *(model.name for model in router.models if model.name not in content["models"])]
        atomic_write_json(manifest, {**content, "models": names})
