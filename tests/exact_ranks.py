"""What ranks of the tests of exactness run; other processes import this, so it loads little."""

import time
from pathlib import Path

from anabranch.train import Trainer, read_run_config


def train(rank: int, world: int, out: str, layout: dict, slowly: bool = False) -> None:
    """The run whose config is beside ``out``, in a layout; goes on with what there is. Slowly: waits a moment after each checkpoint."""

    def wait(event) -> None:
        if slowly and event.kind == "checkpoint":
            time.sleep(0.2)

    layout = dict(layout)
    recompute = layout.pop("recompute", False)
    config = read_run_config(Path(out).parent)
    config = config.replace(parallel=config.parallel.replace(**layout), train=config.train.replace(recompute=recompute))
    resumes = (Path(out) / "config.json").exists()
    Trainer(config, out, resume=resumes, on_event=wait).fit()
