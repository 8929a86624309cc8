"""Real data that is not part of the package: where ``ANABRANCH_DATA`` names its folder, tests run on it too."""

from pathlib import Path

import pytest

from anabranch.places import DATA_FOLDER, data_folder


def real_data(name: str) -> Path:
    """Where ``name`` lies, or would lie if the folder were named."""
    return (data_folder() or Path(f"${DATA_FOLDER}")) / name


def needs_data(name: str) -> pytest.MarkDecorator:
    """Skip, with a word, where the folder is not named or has no ``name``."""
    path = real_data(name)
    return pytest.mark.skipif(not path.exists(), reason=f"no {path}; {DATA_FOLDER} names the folder of real data")
