"""Files of weights under somebody else's hands: read, so that what is written to them is an error, and never the end of the process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from anabranch.data import ByteTokenizer
from anabranch.errors import CheckpointError
from anabranch.lm import Decoder, load_model, save_model, tensors
from anabranch.lm.stored_file import StoredFile
from anabranch.lm.tensors import PickleFiles, SafetensorsFiles
from anabranch.nn import MoE
from anabranch.nn.quantize import quantize
from anabranch.serving.expertflow import loading

WRITTEN = "was written to while it was in use; start again"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(200)))
    return tmp_path / "a"


def grow(path):
    with path.open("ab") as file:
        file.write(b"x")


def rewrite(path):
    was = path.stat()
    with path.open("r+b") as file:
        file.write(b"other")
    # Within the grain of the system's clock, it may be.
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns + 1))


CHANGES = {"shortened": lambda path: os.truncate(path, 9), "grown": grow, "rewritten": rewrite}


def replace(path):
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)


def test_bytes_are_those_of_the_place(file, monkeypatch):
    stored = StoredFile(file)
    assert (stored.size, bytes(stored.read(7, 5)), bytes(stored.read(200, 0))) == (200, bytes(range(7, 12)), b"")
    with stored.beginning() as beginning:
        assert beginning.read(3) == b"\0\1\2"
    with pytest.raises(CheckpointError, match="ends before byte 205; it is truncated"):
        stored.read(199, 6)
    monkeypatch.delattr(os, "preadv", raising=False)
    assert bytes(stored.read(7, 5)) == bytes(range(7, 12))


@pytest.mark.parametrize("how", CHANGES)
def test_what_is_written_to_it_is_told(file, how):
    stored = StoredFile(file)
    CHANGES[how](file)
    with pytest.raises(CheckpointError, match=WRITTEN):
        stored.read(0, 5)


@pytest.mark.parametrize("become", [replace, Path.unlink])
def test_what_becomes_of_its_name_does_not_reach_it(file, become):
    stored = StoredFile(file)
    become(file)
    assert bytes(stored.read(7, 5)) == bytes(range(7, 12))


def test_it_is_closed_with_its_last_reader(file):
    stored = StoredFile(file)
    handle = stored._handle
    del stored
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_sources_of_tensors_tell_it(kind, how, tmp_path):
    path, tensors = tmp_path / "x", {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(True)}
    if kind == "pickle":
        torch.save(tensors, path)
        source = PickleFiles([path])
    else:
        save_file(tensors, path)
        source = SafetensorsFiles([path])
    assert torch.equal(source.read("a"), tensors["a"])
    assert torch.equal(source.read_one("a", 1), tensors["a"][1])
    assert torch.equal(source.read("b"), tensors["b"])
    CHANGES[how](path)
    for read in (lambda: source.read("a"), lambda: source.read_one("a", 1)):
        with pytest.raises(CheckpointError, match=WRITTEN):
            read()


def test_every_type_is_read(tmp_path):
    kinds = ["uint16", "uint32", "uint64", "complex64", "bool", "int8", "float64", "bfloat16", "float8_e4m3fn"]
    tensors = {kind: torch.ones(2, 3, dtype=torch.float32).to(getattr(torch, kind)) for kind in kinds}
    save_file({**tensors, "none": torch.empty(0, 3)}, tmp_path / "x")
    source = SafetensorsFiles([tmp_path / "x"])
    for kind, value in tensors.items():
        assert source.read(kind).dtype == value.dtype
        assert torch.equal(source.read(kind).view(torch.uint8), value.view(torch.uint8))
    assert source.read("none").shape == (0, 3)


# -- every reader, in a process of its own each, whose file is shortened under it, or gets other bytes

# Says of each case how a child ended: its exit status, or what it was ended by (negative).
UNDER = """
import json, os, sys, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from anabranch.errors import AnabranchError
from anabranch.lm import load_model
from anabranch.lm.quantized import load_quantized
from anabranch.serving.expertflow import load_offloaded

TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])

def run(case):
    path, file = Path(case["path"]), Path(case["file"])
    if "budget" in case:
        model, _, engine = load_offloaded(path, case["budget"], quantize=case["bits"], predictor=None)
    elif case["bits"]:
        model = load_quantized(path, case["bits"])[0].eval()
    else:
        model = load_model(path)[0].eval()
    with torch.inference_mode():
        model(TOKENS[:, :1])
    if case["how"] == "shortened":
        os.truncate(file, 4096)
    else:
        was = os.stat(file)
        with file.open("r+b") as other:
            other.write(bytes(was.st_size))
        os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    try:
        with torch.inference_mode():
            logits = model(TOKENS).logits_BLV
    except AnabranchError as error:
        return 3 if str(file) in str(error) else 4
    return 0 if bool(logits.isfinite().all()) else 5

found = {}
for name, case in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        status = 9
        try:
            status = run(case)
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    found[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("how", ["shortened", "rewritten"])
def test_no_reader_is_ended_or_misled_by_a_file_that_is_written_into(how, tmp_path):
    """With experts on disk the request is told; models in memory go on."""
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    from few_bits_packings import folder_of
    from gguf_made import medium, with_blocks

    def saved(name, bits=None):
        model = Decoder.Config(
            vocab_size=257,
            dim=64,
            num_layers=2,
            max_positions=64,
            feed_forward=MoE.Config(num_experts=8, hidden_dim=64),
        ).build(seed=1)
        if bits:
            quantize(model, bits)
        save_model(tmp_path / name, model, ByteTokenizer())
        return tmp_path / name

    gptq = folder_of(tmp_path, "gptq v2")
    gguf = with_blocks(tmp_path / "m.gguf", medium, experts=6)
    cases = {
        "gguf, as stored": {"path": gguf, "bits": "stored"},
        "gguf, in floating point": {"path": gguf, "bits": None},
        "gguf, as stored, budget": {"path": gguf, "bits": "stored", "budget": "400kB"},
        "gguf, in floating point, budget": {"path": gguf, "bits": None, "budget": "2MB"},
        "gptq, as stored": {"path": gptq, "bits": "stored"},
        "gptq, as stored, budget": {"path": gptq, "bits": "stored", "budget": "20kB"},
    }
    for bits in (None, "int8", "int4"):
        made = saved(f"in {bits}", bits)
        cases[f"folder in {bits}"] = {"path": made, "bits": None}
        cases[f"folder in {bits}, budget"] = {"path": made, "bits": None, "budget": "120kB" if bits is None else "50kB"}
    for number, (name, case) in enumerate(cases.items()):
        own = tmp_path / f"own{number}"
        if case["path"].is_dir():
            case["path"] = shutil.copytree(case["path"], own)
            case["file"] = own / "model.safetensors"
        else:
            case["path"] = case["file"] = shutil.copy(case["path"], own.with_suffix(".gguf"))
        case |= {"wanted": 3 if "budget" in name else 0, "how": how}
    done = subprocess.run(
        [sys.executable, "-c", UNDER, json.dumps(cases, default=str)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {name: case["wanted"] for name, case in cases.items()}, done.stderr


@pytest.mark.parametrize("reader", [SafetensorsFiles, PickleFiles])
def test_a_file_that_is_replaced_while_it_is_opened_is_refused(reader, tmp_path, monkeypatch):
    """Its header is read by name: of the new file, and the numbers of the old one."""
    path = tmp_path / "m"
    for place, name in ((path, "first"), (tmp_path / "other", "second")):
        value = {name: torch.zeros(4), "more": torch.ones(9)}
        save_file(value, place) if reader is SafetensorsFiles else torch.save(value, place)
    original, done = (tensors.safe_open, torch.load)[reader is PickleFiles], []

    def replacing(*args, **kwargs):
        if not done:
            done.append(os.replace(tmp_path / "other", path))
        return original(*args, **kwargs)

    monkeypatch.setattr(*((tensors, "safe_open") if reader is SafetensorsFiles else (torch, "load")), replacing)
    with pytest.raises(CheckpointError, match=f"{path} was replaced while it was opened; read it again"):
        reader([path])
    assert sorted(reader([path]).names) == ["more", "second"]


def test_a_name_is_of_the_file_that_was_opened(file):
    stored = StoredFile(file)
    stored.check_name()
    rewrite(file)
    stored.check_name()
    replace(file)
    with pytest.raises(CheckpointError, match="was replaced while it was opened"):
        stored.check_name()
    file.unlink()
    with pytest.raises(CheckpointError, match="was replaced while it was opened"):
        stored.check_name()


@pytest.mark.parametrize("bits", [None, "int8"])
def test_experts_and_the_layers_around_them_are_of_one_model(bits, tmp_path, monkeypatch):
    """Experts are opened by name, when the others are open: by then the name may be of another model, of the same sizes."""
    for seed, name in enumerate(("m", "other")):
        model = Decoder.Config(
            vocab_size=257, dim=64, num_layers=2, feed_forward=MoE.Config(num_experts=4, hidden_dim=32)
        ).build(seed=seed)
        if bits:
            quantize(model, bits)
        save_model(tmp_path / name, model, ByteTokenizer())
    table = loading._table

    def replaced(*given):
        os.replace(tmp_path / "other" / "model.safetensors", tmp_path / "m" / "model.safetensors")
        return table(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loading, "_table", replaced)
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors was replaced while it was opened; read it again"
        ):
            loading.load_offloaded(tmp_path / "m", "1MiB")
    model, _, engine = loading.load_offloaded(tmp_path / "m", "1MiB")
    with engine, torch.inference_mode():
        found = model(torch.arange(9)[None]).logits_BLV
    wanted, _ = load_model(tmp_path / "m")
    with torch.inference_mode():
        torch.testing.assert_close(found, wanted.eval()(torch.arange(9)[None]).logits_BLV)
