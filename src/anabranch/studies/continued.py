"""Arms that go on from one trained model: its training is done once and kept, and every arm of a seed begins with the same weights."""

import hashlib
import json
import math
import tempfile
from pathlib import Path

from anabranch.config import Config, configclass, to_dict
from anabranch.lm import Decoder, load_model, save_model
from anabranch.locks import locked
from anabranch.places import cache_folder
from anabranch.studies.harness import Progress
from anabranch.train import RunConfig, Trainer

# Added to the seed of the base's training: its order of text is another one than that of the arms.
BASE_SEED = 1000


@configclass
class Continued(Config):
    """One arm: the training of the model it starts from, and its own."""

    base: RunConfig
    run: RunConfig


def base_model(study: str, config: RunConfig, seed: int, progress: Progress) -> Decoder:
    """The model of a seed that arms of ``study`` start from, trained once and kept in the cache folder.

    It is found by its config, device and text. Processes that want it at the same time train it once. Raises KeyboardInterrupt if its
    training was stopped.
    """
    key = [to_dict(config), config.train.device_kind(), config.data.content_digest()]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    place = cache_folder() / "studies" / f"{study}-{digest}-seed{seed}"
    place.parent.mkdir(parents=True, exist_ok=True)

    def wait() -> None:
        progress("waiting for another process that trains the model that arms start from")

    with locked(place.with_name(f".{place.name}.lock"), wait_s=math.inf, on_wait=wait):
        if not (place / "config.json").is_file():
            progress("training the model that arms start from")
            _train(config, seed, place)
    return load_model(place)[0]


def _train(config: RunConfig, seed: int, place: Path) -> None:
    settings = config.train.replace(seed=BASE_SEED + seed, eval_every=None, checkpoint_every=None, keep_checkpoints=1)
    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
        trainer = Trainer(config.replace(train=settings), Path(folder) / "run")
        if trainer.fit().status != "finished":
            raise KeyboardInterrupt
        save_model(place, trainer.model)
