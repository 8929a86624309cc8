"""Files of CTranslate2 that are damaged, in their bytes and in what they hold, are refused by name."""

import pytest
import torch

import whispers
from anabranch.errors import AnabranchError, CheckpointError
from anabranch.heads.whisper import open_whisper
from anabranch.heads.whisper.ctranslate2 import read_variables

WAYS = {
    "flat": lambda tensor: tensor.reshape(-1),
    "one number": lambda tensor: tensor.reshape(-1)[:1],
    "no dimension": lambda tensor: tensor.new_zeros(()),
    "a row more": lambda tensor: torch.cat([tensor.reshape(1, -1), tensor.reshape(1, -1)]),
    "nothing": lambda tensor: tensor.new_zeros(0),
}


@pytest.fixture(scope="module")
def variables():
    return whispers.packed(whispers.drawn(), torch.float32)


@pytest.fixture
def folder(tmp_path):
    return whispers.ctranslate2_folder(tmp_path / "whisper")


@pytest.mark.parametrize("way", WAYS)
def test_variables_of_other_shapes_are_told(folder, variables, way):
    """Each by itself: a file is read whole, or is an error that names the folder."""
    path = folder / "model.bin"
    told = []
    for name, value in variables.items():
        path.write_bytes(whispers.file_of(variables | {name: WAYS[way](torch.as_tensor(value))}))
        try:
            open_whisper(folder)
        except AnabranchError as error:
            told.append(str(error))
    assert len(told) > 20
    assert all(str(folder) in one for one in told)


def test_flipped_bytes_at_its_beginning_are_a_file_or_an_error(tmp_path, variables):
    path, held = tmp_path / "model.bin", whispers.file_of(variables)
    told = []
    for place in range(200):
        for value in (0, 255, held[place] ^ 1, held[place] ^ 128):
            path.write_bytes(held[:place] + bytes([value]) + held[place + 1 :])
            try:
                read_variables(path)
            except CheckpointError as error:
                told.append(str(error))
    assert len(told) > 100
    assert all(str(path) in one for one in told)
