"""Checkpoints of slices on disk."""

import json

import pytest
import torch

from anabranch.cluster.elastic.saving import newest, read_slices, remove_others, write_manifest, write_slices
from anabranch.cluster.elastic.state import Slice
from anabranch.errors import CheckpointError

SIZES = [6, 0, 4]


def piece(first, end, at=0.0):
    numbers = torch.arange(float(first), float(end)) + at
    return Slice(first, end, {"param": numbers, "exp_avg": 2 * numbers}, {"step": torch.tensor(3.0)})


def kept(folder, version=7, at=0.0):
    files = [
        write_slices(folder, 0, {0: piece(0, 4, at), 2: piece(0, 1, at)}, version),
        write_slices(folder, 5, {0: piece(4, 6, at), 2: piece(1, 4, at)}, version),
    ]
    return write_manifest(folder, version, files, SIZES)


def test_what_was_saved_comes_back_whole(tmp_path):
    kept(tmp_path)
    version, whole = read_slices(tmp_path, SIZES)
    assert version == 7
    assert whole[0].tensors["param"].tolist() == list(range(6))
    assert whole[2].tensors["exp_avg"].tolist() == [0, 2, 4, 6]
    assert whole[2].scalars["step"] == 3
    assert sorted(whole) == [0, 2]


def test_the_newest_that_is_whole_counts(tmp_path):
    assert newest(tmp_path) is None
    kept(tmp_path, 7)
    kept(tmp_path, 12, at=1.0)
    # Killed before the manifest.
    write_slices(tmp_path, 0, {0: piece(0, 4)}, 20)
    (tmp_path / "step-x").mkdir()
    assert newest(tmp_path).name == "step-0000000012"
    assert read_slices(tmp_path, SIZES)[1][0].tensors["param"].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_step_that_is_saved_again_is_the_old_checkpoint_until_it_is_the_new_one(tmp_path):
    """Ranks of another layout wrote over files that the manifest named, with another cut."""
    manifest = kept(tmp_path)
    again = [write_slices(tmp_path, 0, {0: piece(0, 6, 1.0), 2: piece(0, 4, 1.0)}, 7)]
    # A rank that was lost has written too.
    write_slices(tmp_path, 5, {0: piece(3, 6, 1.0)}, 7)
    assert read_slices(tmp_path, SIZES)[1][0].tensors["param"].tolist() == list(range(6))
    write_manifest(tmp_path, 7, again, SIZES)
    remove_others(tmp_path, 7, again)
    assert read_slices(tmp_path, SIZES)[1][0].tensors["param"].tolist() == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in manifest.parent.iterdir()) == sorted([*again, "manifest.json"])


def test_what_is_damaged_is_refused(tmp_path):
    manifest = kept(tmp_path)
    (place,) = manifest.parent.glob("rank-5-*.slices")
    sound, told = place.read_bytes(), manifest.read_text()

    def refused(said):
        with pytest.raises(CheckpointError, match=said):
            read_slices(tmp_path, SIZES)
        place.write_bytes(sound)
        manifest.write_text(told)

    place.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    refused("another checksum")
    place.write_bytes(sound[:-3])
    refused("damaged")
    place.write_bytes(b"nothing")
    refused("damaged")
    place.unlink()
    refused("No such file")
    manifest.write_text("{")
    refused("damaged")
    manifest.write_text("[]")
    refused("damaged")
    manifest.write_text(json.dumps({**json.loads(told), "files": json.loads(told)["files"][:1]}))
    refused("those from 4 on are missing")
    manifest.write_text(json.dumps({**json.loads(told), "files": ["../../etc/passwd"]}))
    refused("no file beside it")
    manifest.write_text(json.dumps({**json.loads(told), "schema": 99}))
    refused("schema 99")
    with pytest.raises(CheckpointError, match="of layers with"):
        read_slices(tmp_path, [6, 0, 5])
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        read_slices(tmp_path / "none", SIZES)


def test_one_that_was_held_up_takes_nothing_of_those_who_saved_without_it(tmp_path):
    """It wrote a manifest of files that were gone, and removed theirs."""
    late = [write_slices(tmp_path, 0, {0: piece(0, 6), 2: piece(0, 4)}, 7)]
    again = [write_slices(tmp_path, 1, {0: piece(0, 6, 1.0), 2: piece(0, 4, 1.0)}, 7)]
    write_manifest(tmp_path, 7, again, SIZES)
    remove_others(tmp_path, 7, again)
    before = sorted(path.name for path in newest(tmp_path).iterdir())
    with pytest.raises(CheckpointError, match=f"does not hold {late[0]}"):
        write_manifest(tmp_path, 7, late, SIZES)
    assert sorted(path.name for path in newest(tmp_path).iterdir()) == before
    assert read_slices(tmp_path, SIZES)[1][0].tensors["param"].tolist() == [1, 2, 3, 4, 5, 6]


def test_of_ranks_with_disks_of_their_own_nothing_is_a_checkpoint(tmp_path):
    here = write_slices(tmp_path / "a", 0, {0: piece(0, 4), 2: piece(0, 1)}, 7)
    there = write_slices(tmp_path / "b", 1, {0: piece(4, 6), 2: piece(1, 4)}, 7)
    with pytest.raises(CheckpointError, match=f"does not hold {there}.*one folder of one disk"):
        write_manifest(tmp_path / "a", 7, [here, there], SIZES)
    assert newest(tmp_path / "a") is None
