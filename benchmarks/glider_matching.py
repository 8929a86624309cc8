"""GLIDER's matcher of instructions on the paper's own: does the second wording of a task find the first, and is what is foreign told apart?

    git clone https://github.com/UNITES-Lab/glider
    python benchmarks/glider_matching.py glider/static/generated-instructions --json matching.json

flan_instruction.json and flan_instruction-v2.json are two wordings of 166 tasks, bb_instruction.json two each of 45 other tasks. No model.
"""
# Shapes: M tasks, F foreign instructions

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from _machine import here
from _records import write_record
from anabranch.adapters.glider import Matcher

# Asked by the specification; of the first five it asks nothing.
ASKED = {"top_1": 0.64, "top_2": 0.75, "auroc": 0.87}
FILES = ("flan_instruction.json", "flan_instruction-v2.json", "bb_instruction.json")


def measured(folder: Path) -> dict[str, Any]:
    """Shares of tasks that are among the first, and the area under the curve of the best cosine. Raises SystemExit without the files."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"{folder} has no {missing[0]}; see the top of benchmarks/glider_matching.py")
    first, second, foreign = (json.loads((folder / name).read_text("utf-8")) for name in FILES)
    matcher = Matcher()
    for task, text in first.items():
        matcher.add(task, (text,))
    matcher.fit()
    names, stack = matcher.members()
    cosine_MM = np.array([stack.cosines(matcher.instruct("", second[task])[1]) for task in names])
    rank_M = (cosine_MM > cosine_MM.diagonal()[:, None]).sum(1)
    texts = [text for own in foreign.values() for text in own]
    best_F = np.array([stack.cosines(matcher.instruct("", text)[1]).max() for text in texts])
    best_M = cosine_MM.max(1)
    auroc = ((best_M[:, None] > best_F).mean() + (best_M[:, None] >= best_F).mean()) / 2
    return {
        "tasks": len(names),
        "foreign": len(texts),
        **{f"top_{k}": float((rank_M < k).mean()) for k in (1, 2, 5)},
        "auroc": float(auroc),
        # Its curve has a point for each query.
        "calibration": {name: value for name, value in matcher.calibration().to_dict().items() if name != "curve"},
        "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES},
    }


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the record, beside what was asked."""
    told = {f"top_{k}": (f"among the first {k}", "share of tasks") for k in (1, 2, 5)}
    told["auroc"] = ("told from what is foreign", "AUROC")
    return [
        {"case": case, "ours": found[name], "unit": unit, **_beside(found[name], ASKED.get(name))}
        for name, (case, unit) in told.items()
    ]


def _beside(ours: float, asked: float | None) -> dict[str, Any]:
    """The ratio to the bar, at least 1 where it is reached, and nothing without one."""
    return (
        {} if asked is None else {"peer": asked, "ratio": round(ours / asked, 4), "spread": 0.0, "peer_name": "the bar"}
    )


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="write what was measured into this file")
    given = parser.parse_args()
    found = measured(given.folder)
    if given.json is not None:
        more = {key: found[key] for key in ("tasks", "foreign", "calibration", "sha256")}
        write_record(given.json, {"name": "glider_matching", **here(), "rows": rows(found), **more})
    shares = "  ".join(f"top {k}: {found[f'top_{k}']:.1%}" for k in (1, 2, 5))
    sys.stdout.write(
        f"{found['tasks']} tasks  {shares}  AUROC against {found['foreign']} others {found['auroc']:.3f}\n"
    )


if __name__ == "__main__":
    main()
