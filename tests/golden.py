"""What every preset computes in its first steps: losses, gradient norms, and the tokens it then writes. The same code measures any commit.

    python tests/golden.py --json FILE [PRESET ...]

`side_by_side.py` runs it on two commits of one machine and wants equal bits; `test_golden.py` compares with ``golden.json`` within what
another processor may change. The text is the licence of this project, which is the same on every machine.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from anabranch.config import from_dict
from anabranch.data import DataConfig
from anabranch.lm import SamplingConfig, generate
from anabranch.presets import PRESETS
from anabranch.train import Trainer

STEPS = 20
TOKENS = 24  # written after training, greedily
LICENCE = Path(__file__).parent.parent / "LICENSE"
PROMPT = [ord(letter) for letter in "You may reproduce"]


def run(name: str, folder: Path) -> dict[str, list]:
    """``loss``, ``gradient_norm`` of each step, ``validation`` in nats per token, and ``tokens`` of a preset, one thread, float32."""
    torch.set_num_threads(1)
    preset = PRESETS[name]("tiny")
    data = from_dict(
        DataConfig,
        {
            "corpus": {"kind": "files", "paths": [str(write_text(folder))]},
            "sequence_length": 64,
            "validation_fraction": 0.2,
        },
    )
    train = preset.train.replace(
        steps=STEPS, batch_size=4, log_every=1, device="cpu", eval_every=None, eval_tokens=None, checkpoint_every=None
    )
    out = folder / name
    trainer = Trainer(preset.replace(data=data, train=train), out)
    trainer.fit()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    greedy = SamplingConfig(max_tokens=TOKENS, temperature=0.0)
    return {
        "loss": [line["loss"] for line in steps],
        "gradient_norm": [line["gradient_norm"] for line in steps],
        "validation": [line["nats_per_token"] for line in lines if line["kind"] == "validation"],
        "tokens": generate(trainer.model, [PROMPT, PROMPT[:4]], greedy),
    }


def write_text(folder: Path) -> Path:
    """The paragraphs of the licence, a file each, so that some are held out."""
    texts = folder / "text"
    texts.mkdir(exist_ok=True)
    for number, paragraph in enumerate(LICENCE.read_text(encoding="utf-8").split("\n\n")):
        (texts / f"{number:03d}.txt").write_text(paragraph, encoding="utf-8")
    return texts


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.presets:
            found[name] = run(name, Path(folder))
            print(f"{name}: {found[name]['loss'][0]:.4f} to {found[name]['loss'][-1]:.4f}", file=sys.stderr)
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
