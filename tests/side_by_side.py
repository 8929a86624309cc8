"""Whether two commits compute the same bits: every preset trained for 20 steps by each, one after the other on this machine.

    python tests/side_by_side.py BASE [CHANGED] [--presets dense moe]

BASE and CHANGED are commits; CHANGED left out means the work tree as it is. What is compared is what `golden.py` of the work tree measures.
Exit code 1 and the first difference of each preset where there is one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def measure(commit: str | None, presets: list[str], folder: Path) -> dict[str, Any]:
    """What `golden.py` says of a commit, None for the work tree."""
    tree, out = ROOT, folder / f"{commit or 'work tree'}.json".replace("/", "_")
    if commit is not None:
        tree = folder / commit.replace("/", "_")
        tree.mkdir()
        archive = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x"], cwd=tree, input=archive, check=True)
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "golden.py"), "--json", str(out), *presets]
    subprocess.run(command, env=environment, check=True)
    return json.loads(out.read_text())


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line for each quantity of each preset that is not the same to the bit: where it first differs."""
    found = []
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in before or name not in after:
            found.append(f"{name}: only in {'the first' if name in before else 'the second'}")
            continue
        for what, values in before[name].items():
            others = after[name].get(what)
            if values == others:
                continue
            pairs = list(zip(values, others or [], strict=False))
            place = next((number for number, (one, other) in enumerate(pairs) if one != other), len(pairs))
            said = f"{values[place]} and {others[place]}" if place < len(pairs) else "of another length"  # type: ignore[index]
            found.append(f"{name}: {what} {place} is {said}")
    return found


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("changed", nargs="?")
    parser.add_argument("--presets", nargs="*", default=[])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        before, after = (
            measure(commit, arguments.presets, Path(name)) for commit in (arguments.base, arguments.changed)
        )
    found = differences(before, after)
    print("\n".join(found) or f"{len(before)} presets: the same to the bit")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
