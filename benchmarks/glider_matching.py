"""GLIDER's matcher of instructions on the paper's own: does the second wording of a task find the first, and is what is foreign told apart?

    git clone https://github.com/UNITES-Lab/glider
    python benchmarks/glider_matching.py glider/static/generated-instructions --json matching.json

flan_instruction.json and flan_instruction-v2.json are two wordings of 166 tasks, bb_instruction.json two each of 45 other tasks. No model.
Tasks of P3 (43) are also matched among themselves. Left out in turn, a task's second wording is a query of a task that the pool has not,
while its siblings are still there.
"""
# Shapes: M tasks, F foreign instructions, Q queries

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from _machine import here
from _records import write_record
from anabranch.adapters.glider import Matcher

# Asked by the specification; of the first five it asks nothing.
ASKED = {"top_1": 0.64, "top_2": 0.75, "auroc": 0.87}
SHARES = (1, 2, 5)
P3 = "p3"
FILES = ("flan_instruction.json", "flan_instruction-v2.json", "bb_instruction.json")


def measured(folder: Path) -> dict[str, Any]:
    """Shares of tasks that are among the first, and the area under the curve of the best cosine. Raises SystemExit without the files."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"{folder} has no {missing[0]}; see the top of benchmarks/glider_matching.py")
    first, second, foreign = (json.loads((folder / name).read_text("utf-8")) for name in FILES)
    matcher, cosine_MM = matched(first, second)
    known_M = cosine_MM.max(1)
    texts = [text for own in foreign.values() for text in own]
    stack = matcher.members()[1]
    best_F = np.array([stack.cosines(matcher.instruct("", text)[1]).max() for text in texts])
    is_own_MM = np.eye(len(cosine_MM), dtype=bool)
    of_p3 = {task: text for task, text in first.items() if task.startswith(P3)}
    p3 = shares(matched(of_p3, second)[1]) if of_p3 else {}
    return {
        "tasks": len(cosine_MM),
        "foreign": len(texts),
        "p3_tasks": len(of_p3),
        **shares(cosine_MM),
        **{f"p3_{name}": value for name, value in p3.items()},
        "auroc": area(known_M, best_F),
        "left_out_auroc": area(known_M, np.where(is_own_MM, -1.0, cosine_MM).max(1)),
        "own_cosine": float(cosine_MM[is_own_MM].mean()),
        "other_cosine": float(cosine_MM[~is_own_MM].mean()),
        # Its curve has a point for each query.
        "calibration": {name: value for name, value in matcher.calibration().to_dict().items() if name != "curve"},
        "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES},
    }


def matched(first: Mapping[str, str], second: Mapping[str, str]) -> tuple[Matcher, np.ndarray]:
    """(a pool of the first wordings, cosines ``[M, M]`` of each task's second wording with all of them)."""
    matcher = Matcher()
    for task, text in first.items():
        matcher.add(task, (text,))
    matcher.fit()
    names, stack = matcher.members()
    return matcher, np.array([stack.cosines(matcher.instruct("", second[task])[1]) for task in names])


def shares(cosine_MM: np.ndarray) -> dict[str, float]:
    """Of tasks that their second wording finds among the first so many."""
    rank_M = (cosine_MM > cosine_MM.diagonal()[:, None]).sum(1)
    return {f"top_{k}": float((rank_M < k).mean()) for k in SHARES}


def area(known_M: np.ndarray, unknown_Q: np.ndarray) -> float:
    """Under the curve: the chance that a query of a known task has the greater best cosine, ties by halves."""
    return float(((known_M[:, None] > unknown_Q).mean() + (known_M[:, None] >= unknown_Q).mean()) / 2)


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the record, beside what was asked."""
    told = {f"top_{k}": (f"among the first {k}", "share of tasks") for k in SHARES}
    told["auroc"] = ("told from what is foreign", "AUROC")
    told |= {f"p3_top_{k}": (f"P3 alone, among the first {k}", "share of tasks") for k in SHARES}
    told["left_out_auroc"] = ("told from the same query where its task is left out", "AUROC")
    told["own_cosine"] = ("of a task's two wordings", "mean cosine")
    told["other_cosine"] = ("of wordings of two tasks", "mean cosine")
    return [
        {"case": case, "ours": found[name], "unit": unit, **_beside(found[name], ASKED.get(name))}
        for name, (case, unit) in told.items()
        if name in found
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
        more = {key: found[key] for key in ("tasks", "foreign", "p3_tasks", "calibration", "sha256")}
        write_record(given.json, {"name": "glider_matching", **here(), "rows": rows(found), **more})
    lines = [f"{row['ours']:.3f}  {row['unit']}, {row['case']}\n" for row in rows(found)]
    sys.stdout.write(f"{found['tasks']} tasks, {found['foreign']} foreign instructions\n" + "".join(lines))


if __name__ == "__main__":
    main()
