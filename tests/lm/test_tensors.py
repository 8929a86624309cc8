"""Tensor files: what is written is what safetensors reads, and large tensors begin where devices read whole blocks."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from anabranch.errors import CheckpointError
from anabranch.lm.tensors import BLOCK, write_file, write_tensors
from anabranch.serving.expertflow.loading import read_header


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.small": torch.randn(3, 5),
        "b.experts": torch.randn(4, 32, 32),
        "c.half": torch.randn(6, 3).bfloat16(),
        "d.number": torch.tensor(7),
        "e.turned": torch.randn(64, 32).T,
        "f.none": torch.empty(0, 4),
        "g.yes": torch.tensor([True, False, True]),
        "h.experts": torch.randn(2, 64, 64).half(),
        "naïve": torch.randint(0, 255, (BLOCK,), dtype=torch.uint8),
        "z.eighth": torch.randn(16).to(torch.float8_e4m3fn),
    }


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", tensors())
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float()), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_of_whole_blocks_begin_at_one(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", tensors())
    start, entries = read_header(tmp_path / "model.safetensors")
    begins = {name: start + entries[name]["data_offsets"][0] for name in tensors()}
    whole = {name for name, tensor in tensors().items() if tensor.nbytes % BLOCK == 0 and tensor.nbytes}
    assert whole == {"b.experts", "e.turned", "h.experts", "naïve"}
    assert all(begins[name] % BLOCK == 0 for name in whole)


def test_shards_are_files_of_their_own(tmp_path: Path) -> None:
    write_tensors(tmp_path, tensors(), max_shard_bytes=20_000)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    joined = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert joined.keys() == tensors().keys()


def test_what_has_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x is torch.complex64, which cannot be saved; known: F64"):
        write_file(tmp_path / "model.safetensors", {"x": torch.zeros(2, dtype=torch.complex64)})
    assert not (tmp_path / "model.safetensors").exists()
