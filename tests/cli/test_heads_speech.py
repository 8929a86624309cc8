"""``anabranch heads`` of a Whisper: from a folder of speech to routed heads that are trained, reported and resumed."""

import json
import shlex

import pyarrow.parquet as pq
import pytest

pytest.importorskip("transformers")

import torch

import whispers
from anabranch.heads import routed_heads_of
from anabranch.heads.whisper import (
    Speech,
    measure,
    open_whisper,
    read_sound,
    read_speech,
    transcribe,
    transcribe_sound,
)

SETTINGS = (
    "--set train.batch_size=2 --set train.device=cpu --set train.learning_rate=0.05 --set task.validation_fraction=0.3"
)


@pytest.fixture(scope="module")
def base(work):
    return whispers.ctranslate2_folder(work / "whisper")


@pytest.fixture(scope="module")
def tones(work):
    return whispers.speech(work / "tones")


@pytest.fixture(scope="module")
def heard(cli, work, base, tones):
    """A run of 4 steps, and what it printed."""
    words = f"heads train whisper tones --shared 1 --target 0.5 --learn gates --steps 4 --out heard {SETTINGS} --json"
    done = cli(*shlex.split(words))
    assert done.returncode == 0, done.stderr
    return work / "heard", json.loads(done.stdout)


def test_a_whisper_goes_on_with_routed_heads(heard, base, work):
    folder, told = heard
    assert (told["status"], told["step"], told["steps"]) == ("finished", 4, 4)
    assert len(told["activation_by_layer"]) == 2
    assert told["before"].keys() == told["after"].keys() == {"nats_per_token", "accuracy", "tokens"}
    assert told["before"]["tokens"] == told["after"]["tokens"]
    model, _ = open_whisper(folder)
    assert sorted(routed_heads_of(model)) == [f"model.decoder.layers.{layer}.encoder_attn" for layer in (0, 1)]
    before, _ = open_whisper(base)
    assert torch.equal(model.model.encoder.conv1.weight, before.model.encoder.conv1.weight)


def test_at_the_start_it_is_the_whisper(here, work, base, tones):
    words = f"heads train whisper tones --out silent --steps 0 --quiet {SETTINGS} --json"
    code, out, err = here(*shlex.split(words))
    assert (code, err) == (0, "")
    assert json.loads(out)["after"] == pytest.approx(json.loads(out)["before"])
    before, words_ = open_whisper(base)
    speech = Speech.of(read_speech(tones), before, words_)
    after, _ = open_whisper(work / "silent")
    assert measure(after, speech) == pytest.approx(measure(before, speech), rel=1e-5)


def test_the_report_says_which_heads_listen_to_what(heard, here, work, tones):
    words = "heads report heard --data tones --trace listens.parquet --quiet"
    code, out, err = here(*shlex.split(f"{words} --json"))
    assert (code, err) == (0, "")
    told = json.loads(out)
    model, spoken = open_whisper(heard[0])
    speech = Speech.of(read_speech(tones), model, spoken)
    assert told["nats_per_token"] == pytest.approx(measure(model, speech)["nats_per_token"], rel=1e-5)
    assert (told["files"], len(told["layers"])) == (6, 2)
    layer = told["layers"][0]
    assert layer["by_head"][0] == 1.0
    assert layer["tokens"] == sum(map(len, speech.token_N))
    assert layer["by_domain"].keys() == {"high", "low"}
    # Each domain by its tokens.
    count = dict.fromkeys(("high", "low"), 0)
    for each, tokens in zip(speech.files, speech.token_N, strict=True):
        count[each.domain] += len(tokens)
    mean = sum(layer["by_domain"][name] * count[name] for name in count) / sum(count.values())
    assert layer["activation"] == pytest.approx(mean)
    wrong = 0
    for each, feature_MF in zip(speech.files, speech.feature_NMF, strict=True):
        wrong += transcribe(model, spoken, feature_MF) != each.text
    assert (told["word_error_rate"] > 0) == (wrong > 0)
    assert told["words"] == sum(len(each.text.split()) for each in speech.files)
    assert pq.read_table(work / "listens.parquet").num_rows > 0
    code, out, err = here(*shlex.split(words))
    assert (code, err) == (0, "")
    for part in (
        "each routed head",
        "in 6 files",
        "nats/token",
        "words wrong in what it writes by itself",
        "high",
        "low",
    ):
        assert part in out


def test_a_run_of_speech_that_stopped_goes_on(here, base, tones):
    words = f"heads train whisper tones --shared 1 --steps 2 --learn gates --out parted --quiet {SETTINGS}"
    code, _, err = here(*shlex.split(words))
    assert (code, err) == (0, "")
    code, out, err = here(*shlex.split("heads train --out parted --resume --steps 4 --quiet --json"))
    assert (code, json.loads(out)["step"]) == (0, 4), err
    code, _, err = here(*shlex.split("heads train whisper --out parted --resume"))
    assert (code, err.strip()) == (
        2,
        "error: MODEL is given with --resume, which goes on with the run in parted as it began; leave it out",
    )


def test_speech_is_written_down_by_any_whisper(cli, here, heard, work, base, tones):
    """By one with routed heads, and by a plain one; of files without a text beside them, and of one longer than it hears."""
    whispers.tone(work / "long.wav", hertz=300.0, seconds=2.3, rate=8000, channels=2)
    for name in ("whisper", "heard"):
        model, words = open_whisper(work / name)
        wanted = {
            f"tones/{each.path.relative_to(tones)}": transcribe_sound(model, words, read_sound(each.path))
            for each in read_speech(tones)
        }
        wanted["long.wav"] = transcribe_sound(model, words, read_sound(work / "long.wav"))
        line = shlex.split(f"heads transcribe {name} tones long.wav --json --quiet")
        if name == "heard":
            done = cli(*line)
            code, out, err = done.returncode, done.stdout, done.stderr
        else:
            code, out, err = here(*line)
        assert (code, err) == (0, "")
        told = json.loads(out)
        assert [each["file"] for each in told["files"]] == list(wanted)
        for each in told["files"]:
            pieces = wanted[each["file"]]
            assert [piece["text"] for piece in each["pieces"]] == [piece.text for piece in pieces]
            assert [piece["start_s"] for piece in each["pieces"]] == [piece.start_s for piece in pieces]
            assert each["text"] == " ".join(piece.text for piece in pieces if piece.text)
        assert (told["files"][-1]["seconds"], len(told["files"][-1]["pieces"])) == (pytest.approx(2.3), 3)


def test_what_is_written_is_a_line_for_each_file(here, base, tones):
    code, alone, err = here(*shlex.split("heads transcribe whisper tones/low/1.wav --quiet"))
    assert (code, err, alone.count("\n")) == (0, "", 1)
    code, out, err = here(*shlex.split("heads transcribe whisper tones/low/1.wav tones/low --quiet"))
    assert (code, err) == (0, "")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [name for name, _ in rows] == [f"tones/low/{number}.wav" for number in (1, 1, 3, 5)]
    assert rows[0][1] == rows[1][1] == alone.rstrip("\n")
    # Nothing of a model may steer a terminal.
    assert all(letter.isprintable() or letter in "\n\t" for letter in out)


def test_of_a_folder_every_wav_is_heard_and_other_sound_is_named(here, base, work):
    place = work / "recorder"
    place.mkdir()
    whispers.tone(place / "b.wav")
    whispers.tone(place / "A.WAV")
    (place / "._b.wav").write_bytes(b"of a Mac")
    (place / "talk.mp3").write_bytes(b"ID3")
    code, out, err = here(*shlex.split("heads transcribe whisper recorder --quiet --json"))
    told = json.loads(out)
    assert (code, [each["file"] for each in told["files"]]) == (0, ["recorder/A.WAV", "recorder/b.wav"])
    assert told["unread"] == ["recorder/talk.mp3"]
    assert err == "talk.mp3: not read, as no WAV; make them one each, as by ffmpeg -i talk.mp3 talk.wav\n"
    # Of what is learned from, texts whose sound is not there, too.
    for name in ("A", "b", "lost"):
        (place / f"{name}.txt").write_text("a tone")
    (place / "talk.mp3").unlink()
    code, _, err = here(*shlex.split(f"heads train whisper recorder --shared 1 --steps 1 --out recorded {SETTINGS}"))
    assert code == 0, err
    assert "lost.txt: no .wav of that name" in err.splitlines()
    code, _, err = here(*shlex.split("heads report recorded --data recorder --quiet"))
    assert (code, err) == (0, "lost.txt: no .wav of that name\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("transcribe whisper nowhere.wav", "cannot read nowhere.wav as a WAV"),
        ("transcribe whisper text", "text has no .wav files"),
        ("transcribe whisper tones tones/low/1.txt", "cannot read tones/low/1.txt as a WAV"),
        ("transcribe tones tones", "tones holds no Whisper"),
        ("transcribe whisper tones --language de", "language is 'de', and the model knows en alone"),
        ("transcribe whisper tones --device nowhere", "nowhere"),
        ("train whisper --out z", "whisper is a Whisper; give a folder of speech after it"),
        ("train whisper nowhere --out z", "nowhere is no folder; speech is a folder of .wav files"),
        ("train whisper text --out z", "text has no .wav files"),
        ("train whisper tones --out tones", "tones"),
        ("train whisper tones --out whisper/z", "whisper"),
        ("train whisper tones --out z --shared 4", "num_shared is 4, but the attention has 4 heads"),
        (
            "train whisper tones --out z --set model.dim=4",
            "--set model.dim: of a Whisper, fields of train and task.heads",
        ),
        ("train whisper tones --out z --set task.speech=x", "--set task.speech"),
        ("train whisper tones --out z --target nan", "target"),
        ("train whisper tones --out z --set task.validation_fraction=1", "validation_fraction"),
        ("train whisper tones --out heard", "heard"),
        ("train --resume --out heard --learn all", "--learn is given with --resume"),
        ("report whisper --data tones", "whisper has no routed heads; anabranch heads train puts some on"),
        ("report heard", "heard is a Whisper; name a folder of speech with --data"),
        ("report heard --data text", "text has no .wav files"),
        ("report heard --data tones --dtype float16", "--dtype and --sequence-length are for models of text"),
        ("report heard --data tones --sequence-length 4", "--dtype and --sequence-length are for models of text"),
        ("report heard --data tones --trace z", "its name must end with .parquet"),
    ],
)
def test_wrong_lines_end_in_one_line(heard, here, work, words, says):
    code, out, err = here("heads", *shlex.split(words), "--quiet")
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert not (work / "z").exists()


@pytest.mark.parametrize(
    ("said", "written", "wrong"),
    [
        ("the cat sat", "The cat sat.", 0),
        ("the cat sat", "the sat", 1),
        ("the cat sat", "the big cat sat", 1),
        ("the cat sat", "a dog", 3),
        ("don't", "dont", 1),
        ("one two", "", 2),
    ],
)
def test_words_that_are_wrong(said, written, wrong):
    from anabranch.cli.heads.speech import word_errors

    assert word_errors(said, written) == (wrong, len(said.split()))
