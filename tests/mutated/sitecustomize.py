"""Puts the changed module of `mutations` into Python processes that tests start: they find this file by PYTHONPATH."""

import os
import sys
from pathlib import Path

if "ANABRANCH_MUTANT" in os.environ:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import mutations

    sys.path.pop(0)
    mutations.install(mutations.named(os.environ["ANABRANCH_MUTANT"]))
