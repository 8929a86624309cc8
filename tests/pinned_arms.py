"""The first steps of the arms that a study trains by default, at its smoke size, on the text of `golden`.

python tests/pinned_arms.py      # writes pinned_arms.json; say in the change what moved and why
"""

import json
import tempfile
from pathlib import Path

import torch

import golden
from anabranch import studies
from anabranch.config import from_dict
from anabranch.data import DataConfig
from anabranch.studies.harness import pick_arms
from anabranch.studies.provenance import parts
from anabranch.train import RunConfig, Trainer

STEPS = 3
RECORD = Path(__file__).with_suffix(".json")
NAMES = ("alf_lb", "chain", "duo_llm", "local_routing_consistency", "parscale", "rexmoe", "rmoe", "versatile")


def losses(name: str, folder: Path) -> dict[str, list[float]]:
    """The loss of each step, by arm; one thread, float32, seed 0."""
    torch.set_num_threads(1)
    study = studies.find(name)()
    corpus = {"kind": "files", "paths": [str(golden.write_text(folder))]}
    data = from_dict(DataConfig, {"corpus": corpus, "sequence_length": 64, "validation_fraction": 0.2})
    found = {}
    for arm in pick_arms(study, None):
        runs = [part for part in parts(arm.config) if isinstance(part, RunConfig)]
        if runs:
            config = runs[-1]  # the arm's own; before it stands that of the model it starts from
            train = config.train.replace(
                steps=STEPS,
                batch_size=4,
                log_every=1,
                device="cpu",
                eval_every=None,
                eval_tokens=64,
                checkpoint_every=None,
            )
            out = folder / arm.name
            Trainer(config.replace(data=data, train=train), out).fit()
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            found[arm.name] = [line["loss"] for line in lines if line["kind"] == "train"]
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        made = {study: losses(study, Path(name) / study) for study in NAMES if (Path(name) / study).mkdir() is None}
    RECORD.write_text(json.dumps(made, indent=1) + "\n")
