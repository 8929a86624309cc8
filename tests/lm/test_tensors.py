"""Tensor files: what is written is what safetensors reads, and large tensors begin where devices read whole blocks."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from anabranch.errors import CheckpointError
from anabranch.lm.shards import write_file, write_tensors
from anabranch.lm.tensors import BLOCK, open_tensors
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


# Shards and their index


def shards(folder: Path, files: dict[str, dict[str, float]], weight_map: object, *, safe: bool = True) -> Path:
    """A folder of shards, each tensor a number, with this index."""
    kind = "model.safetensors" if safe else "pytorch_model.bin"
    for name, values in files.items():
        held = {key: torch.tensor([value]) for key, value in values.items()}
        save_file(held, folder / name) if safe else torch.save(held, folder / name)
    (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("safe", [True, False])
def test_the_index_says_which_copy_counts(tmp_path: Path, safe: bool) -> None:
    files = {"a.bin": {"x": 1.0, "y": 2.0}, "b.bin": {"x": -1.0, "y": -2.0, "left over": 5.0}}
    source = open_tensors(shards(tmp_path, files, {"x": "a.bin", "y": "b.bin"}, safe=safe))
    assert {name: source.read(name).item() for name in source.names} == {"x": 1.0, "y": -2.0}


@pytest.mark.parametrize("safe", [True, False])
def test_an_index_that_its_shards_do_not_keep_is_told(tmp_path: Path, safe: bool) -> None:
    shards(tmp_path, {"a.bin": {"x": 1.0}, "b.bin": {"y": 1.0}}, {"x": "a.bin", "y": "b.bin", "z": "b.bin"}, safe=safe)
    with pytest.raises(CheckpointError, match=r"b.bin lacks 'z', which the index says it holds"):
        open_tensors(tmp_path)
    (tmp_path / "b.bin").unlink()
    with pytest.raises(CheckpointError, match=r"b.bin is missing; copy the model folder again"):
        open_tensors(tmp_path)


def test_links_of_a_cache_are_followed(tmp_path: Path) -> None:
    """Hugging Face's cache: plain names in the folder, links from them to where the data lies."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    shards(tmp_path / "blobs", {"0a1b": {"x": 3.0}}, {})
    (tmp_path / "snapshot/model-1.safetensors").symlink_to("../blobs/0a1b")
    shards(tmp_path / "snapshot", {}, {"x": "model-1.safetensors"})
    assert open_tensors(tmp_path / "snapshot").read("x").item() == 3.0


WAYS_OUT = st.sampled_from(
    ["..", ".", "", "/", "a.bin/..", "../secret.bin", "in/../../secret.bin", "./a.bin", "a.bin/", "in\\a", "\0"]
)


@settings(max_examples=20, deadline=None)
@given(st.one_of(WAYS_OUT, st.text(max_size=8), st.integers(), st.none(), st.lists(st.text(max_size=2), max_size=2)))
@example("{secret}")
def test_an_index_leads_nowhere_out_of_its_folder(file: object) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        folder.mkdir()
        save_file({"x": torch.tensor([666.0])}, Path(name, "secret.bin"))
        file = str(Path(name, "secret.bin")) if file == "{secret}" else file
        shards(folder, {"a.bin": {"x": 1.0}}, {"x": file})
        with pytest.raises(CheckpointError, match=r"must be the name of a file beside it|is missing|cannot read"):
            open_tensors(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "a.bin"])
def test_an_index_without_a_map(tmp_path: Path, weight_map: object) -> None:
    with pytest.raises(CheckpointError, match=r"index.json has no weight_map from tensor to file"):
        open_tensors(shards(tmp_path, {"a.bin": {"x": 1.0}}, weight_map))


def test_json_as_deep_as_the_sea(tmp_path: Path) -> None:
    shards(tmp_path, {}, {})
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"cannot read .*index.json: "):
        open_tensors(tmp_path)


@pytest.mark.parametrize("offsets", [5, None, "0", [0], [0, 4, 8], [0, True]])
def test_offsets_of_another_form_are_told(tmp_path, offsets):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"its entry 'a' is .*; it must have dtype, shape, data_offsets"):
        read_header(path)
