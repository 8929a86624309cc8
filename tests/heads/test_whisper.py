"""Routed heads of a Whisper: files of CTranslate2, sound, texts as tokens, what is measured, and how heads learn."""

import contextlib
import itertools
import math
import struct
import wave

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

import whispers
from anabranch.errors import CheckpointError, ConfigError, DataError, TokenizerError
from anabranch.heads import HeadRouting, head_report, put_heads, routed_heads_of
from anabranch.heads.whisper import (
    CROSS,
    Speech,
    SpeechTask,
    Words,
    is_whisper,
    measure,
    open_whisper,
    read_speech,
    save_whisper,
    transcribe,
)
from anabranch.heads.whisper.ctranslate2 import read_variables, whisper_tensors
from anabranch.heads.whisper.sound import (
    RATE,
    feature_of,
    features_of,
    pieces_of,
    read_sound,
    resampled,
    told_unread,
    unread_in,
)
from anabranch.heads.whisper.task import IGNORED, split
from anabranch.heads.whisper.writing import Written, listened, transcribe_sound, write
from anabranch.train import TaskRunConfig, TrainConfig, Trainer
from anabranch.train.schedule import Constant


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("whisper")


@pytest.fixture(scope="module")
def base(place):
    return whispers.folder(place / "base")


@pytest.fixture(scope="module")
def tones(place):
    return whispers.speech(place / "tones")


def learned(base, tones):
    model, words = open_whisper(base)
    return model, words, Speech.of(read_speech(tones), model, words)


# Files


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0), (torch.float16, 2e-2)])
def test_a_file_of_ctranslate2_is_the_model(tmp_path, dtype, tolerance):
    theirs = whispers.drawn()
    model, words = open_whisper(whispers.ctranslate2_folder(tmp_path / "ct2", theirs, dtype))
    heard = torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(0))
    token_BL = torch.tensor([[257, 258, 5, 6], [257, 258, 9, 200]])
    wanted = theirs(input_features=heard, decoder_input_ids=token_BL).logits
    found = model(input_features=heard, decoder_input_ids=token_BL).logits
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert (words.start, words.end) == ((whispers.START, whispers.PLAIN), whispers.END)
    assert model.generation_config.suppress_tokens == [7, 8]
    assert model.generation_config.begin_suppress_tokens == [32, 256]
    # Every weight is one of the file, and none is left as it was drawn.
    tensors = whisper_tensors(read_variables(tmp_path / "ct2/model.bin"))
    assert tensors.keys() == model.state_dict().keys() - {"proj_out.weight"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_a_file_of_whole_numbers_is_the_model_of_what_they_stand_for(tmp_path, dtype):
    """As CTranslate2 makes them: a row's largest is 127 of int8, the largest of all 1,024 of int16."""
    theirs = whispers.drawn()
    made, wanted = {}, {}
    for name, value in whispers.packed(theirs).items():
        wanted[name] = made[name] = value
        if name.endswith("weight"):
            largest = value.abs().flatten(1).amax(1) if dtype is torch.int8 else value.abs().max()
            # A row of noughts, as that of padding is, has the scale 1.
            made[f"{name}_scale"] = (127 if dtype is torch.int8 else 1024) / largest.where(largest > 0, 127)
            each = made[f"{name}_scale"].reshape(-1, *[1] * (value.dim() - 1))
            made[name] = (value * each).round().to(dtype)
            wanted[name] = made[name].float() / each
            # No more than half a step away.
            assert ((wanted[name] - value).abs() * each).max() <= 0.5001
    whispers.ctranslate2_folder(tmp_path / "ct2")
    for file, variables in (("bytes", made), ("floats", wanted)):
        (tmp_path / "ct2/model.bin").write_bytes(whispers.file_of(variables))
        (tmp_path / "ct2").rename(tmp_path / file)
        (tmp_path / "ct2").mkdir()
        for other in ("config.json", "tokenizer.json"):
            (tmp_path / "ct2" / other).write_bytes((tmp_path / file / other).read_bytes())
    found, floats = (open_whisper(tmp_path / name)[0].state_dict() for name in ("bytes", "floats"))
    for name, value in theirs.state_dict().items():
        assert torch.equal(found[name], floats[name]), name
        assert found[name].shape == value.shape


def test_what_is_a_whisper(base, tmp_path):
    assert is_whisper(base)
    assert is_whisper(whispers.ctranslate2_folder(tmp_path / "ct2"))
    assert not is_whisper(tmp_path)
    assert not is_whisper(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not is_whisper(tmp_path)
    (tmp_path / "model.bin").write_bytes(whispers.file_of({}, spec="TransformerSpec"))
    assert not is_whisper(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"holds no Whisper: neither a config.json of model_type whisper nor model.bin"
    ):
        open_whisper(tmp_path)


# A weight in one byte each, and where its scale is.
BYTES, SCALE = torch.ones(40, 32, dtype=torch.int8), "decoder/layer_0/ffn/linear_0/weight_scale"


def changed(**changes):
    """The variables, with some others; None leaves one out."""
    held = whispers.packed(whispers.drawn()) | changes
    return {name: value for name, value in held.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder/embeddings/weight": None}, "there is no decoder/embeddings/weight"),
        ({"encoder/layer_1/ffn/linear_0/bias": None}, "there is no encoder/layer_1/ffn/linear_0/bias"),
        ({"decoder/num_heads": None}, "there is no decoder/num_heads"),
        ({"decoder/num_heads": torch.ones(2, dtype=torch.int16)}, "or it is no whole number"),
        ({"encoder/layer_0/self_attention/linear_0/weight": None}, "there are no layers of the encoder"),
        ({"encoder/layer_0/self_attention/linear_0/bias": torch.ones(96)}, "the keys of .* have a bias"),
        (
            {"decoder/layer_0/ffn/linear_0/weight": torch.ones(40, 32, dtype=torch.int8)},
            "is torch.int8, and there is no decoder/layer_0/ffn/linear_0/weight_scale beside it",
        ),
        (
            {"decoder/layer_0/ffn/linear_0/weight": BYTES, f"{SCALE}": torch.ones(39)},
            r"weight_scale has 39 numbers, and .* is of shape \[40, 32\]",
        ),
        ({"decoder/layer_0/ffn/linear_0/weight": BYTES, f"{SCALE}": torch.zeros(40)}, "numbers that are not above 0"),
        ({"decoder/layer_0/ffn/linear_0/weight": BYTES, f"{SCALE}": torch.full((40,), math.nan)}, "or not finite"),
        (
            {"decoder/layer_0/ffn/linear_0/weight": BYTES, f"{SCALE}": torch.ones(40, dtype=torch.int8)},
            "no .*_scale beside",
        ),
        (
            {"decoder/layer_1/ffn/linear_0/weight": torch.ones(39, 32)},
            r"model.decoder.layers.1.fc1.weight is \[39, 32\]",
        ),
    ],
)
def test_files_that_lack_something(tmp_path, changes, message):
    whispers.ctranslate2_folder(tmp_path / "ct2")
    (tmp_path / "ct2/model.bin").write_bytes(whispers.file_of(changed(**changes)))
    with pytest.raises(CheckpointError, match=message):
        open_whisper(tmp_path / "ct2")


SMALL = whispers.file_of({"a/b": torch.ones(2, 3), "c": torch.tensor(4, dtype=torch.int16)})


@given(end=st.integers(0, len(SMALL) - 5))
def test_a_file_that_is_cut_is_refused(tmp_path_factory, end):
    path = tmp_path_factory.mktemp("cut") / "model.bin"
    path.write_bytes(SMALL[:end])
    with pytest.raises(CheckpointError, match="is no Whisper of CTranslate2 that can be read"):
        read_variables(path)


@given(place=st.integers(0, len(SMALL) - 1), value=st.integers(0, 255))
def test_a_file_with_a_changed_byte_is_read_or_refused(tmp_path_factory, place, value):
    path = tmp_path_factory.mktemp("changed") / "model.bin"
    path.write_bytes(SMALL[:place] + bytes([value]) + SMALL[place + 1 :])
    with contextlib.suppress(CheckpointError):
        assert read_variables(path).keys() <= {"a/b", "c"} or place < len(SMALL) - 4


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (struct.pack("<I", 6) + whispers.text("WhisperSpec") + struct.pack("<II", 3, 2**31), "says that it has"),
        (SMALL.replace(whispers.text("a/b") + b"\2", whispers.text("a/b") + b"\x63"), "a/b has 99 dimensions"),
        (SMALL.replace(whispers.text("c") + b"\0\2", whispers.text("c") + b"\0\x09"), "c is of type 9; known are"),
        (
            SMALL.replace(struct.pack("<III", 2, 3, 24)[:8], struct.pack("<II", 2**31, 2**31)),
            r"a/b of shape \[2147483648",
        ),
    ],
)
def test_files_that_say_what_cannot_be(tmp_path, held, message):
    (tmp_path / "model.bin").write_bytes(held)
    with pytest.raises(CheckpointError, match=message):
        read_variables(tmp_path / "model.bin")


def test_folders_of_transformers_that_are_damaged(tmp_path):
    whispers.folder(tmp_path / "base")
    held = (tmp_path / "base/model.safetensors").read_bytes()
    (tmp_path / "base/model.safetensors").write_bytes(held[: len(held) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        open_whisper(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        open_whisper(tmp_path / "base")
    whispers.folder(tmp_path / "base", whispers.drawn(d_model=48))
    whispers.drawn().config.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"is \[.*48.*and the model that its config describes has"):
        open_whisper(tmp_path / "base")


def test_tokenizers_that_are_not_its_own(tmp_path):
    whispers.folder(tmp_path / "base")
    (tmp_path / "base/tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"put Whisper's tokenizer.json beside its weights"):
        open_whisper(tmp_path / "base")
    whispers.words(tmp_path / "base/tokenizer.json", signs=whispers.SIGNS[:2])
    with pytest.raises(TokenizerError, match=r"has no <\|notimestamps\|> that the model knows"):
        open_whisper(tmp_path / "base")


def test_a_model_of_several_languages_is_told_which(tmp_path):
    whispers.words(tmp_path / "tokenizer.json", signs=(*whispers.SIGNS, "<|en|>", "<|de|>", "<|transcribe|>"))
    words = Words.of(tmp_path / "tokenizer.json", 51865)
    assert words.start == (257, 259, 261, 258)
    assert Words.of(tmp_path / "tokenizer.json", 51865, "de").start == (257, 260, 261, 258)


def test_a_language_that_it_does_not_know_is_named(tmp_path):
    signs = (*whispers.SIGNS, "<|en|>", "<|transcribe|>", "<|nocaptions|>")
    whispers.words(tmp_path / "tokenizer.json", signs=signs)
    with pytest.raises(ConfigError, match=r"language is 'xx', which .*tokenizer.json does not know"):
        Words.of(tmp_path / "tokenizer.json", 51865, "xx")
    with pytest.raises(ConfigError, match="language is 'de', and the model knows en alone"):
        Words.of(tmp_path / "tokenizer.json", 51864, "de")
    assert Words.of(tmp_path / "tokenizer.json", 51865).silence == 261
    # Of a model that has no such word there is none.
    assert Words.of(tmp_path / "tokenizer.json", 260).silence is None


def test_a_text_begins_with_a_space_and_comes_back(base):
    _, words = open_whisper(base)
    tokens = words.encode("  He said: ä! \n")
    assert words.tokenizer.decode(tokens) == " He said: ä!"
    assert words.decode([*words.start, *tokens, words.end]) == "He said: ä!"


# Sound


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_files_of_all_widths_are_the_same_sound(tmp_path, width, channels):
    path = whispers.tone(tmp_path / "a.wav", width=width, channels=channels, hertz=500, seconds=0.1)
    wanted = 0.5 * torch.sin(2 * math.pi * 500 * torch.arange(1600, dtype=torch.float64) / RATE)
    torch.testing.assert_close(read_sound(path).double(), wanted, atol=2 ** -(8 * width - 1) + 1e-6, rtol=0)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_a_resampled_tone_is_the_tone(rate):
    def tone(of):
        return torch.sin(2 * math.pi * 440 * torch.arange(of // 4) / of)

    found, wanted = resampled(tone(rate), rate), tone(RATE)
    assert abs(len(found) - len(wanted)) <= 1
    # But for its ends, where there is silence on one side.
    torch.testing.assert_close(found[200:3700], wanted[200:3700], atol=2e-3, rtol=0)


def test_what_a_lower_rate_cannot_hold_is_silent():
    high = torch.sin(2 * math.pi * 10_000 * torch.arange(12_000) / 48_000)
    assert resampled(high, 48_000)[200:3700].abs().max() < 2e-3
    assert torch.equal(resampled(high, RATE), high)


def test_long_sound_is_resampled_as_in_one_piece():
    sound = torch.randn(3 * 22_050, generator=torch.Generator().manual_seed(0))
    whole = resampled(sound, 22_050)
    part = resampled(sound[22_050:], 22_050)
    torch.testing.assert_close(whole[RATE + 100 :], part[100:], atol=1e-5, rtol=0)


def test_speech_is_read_in_order_with_folders_as_domains(tones):
    found = read_speech(tones)
    assert [each.path.name for each in found] == ["0.wav", "2.wav", "4.wav", "1.wav", "3.wav", "5.wav"]
    assert [each.domain for each in found] == ["high"] * 3 + ["low"] * 3
    assert found[1].text == "tone la la 2"


def test_speech_of_any_ending_is_read_and_the_rest_is_told(tmp_path):
    """Recorders and Windows write capitals; Macs leave hidden halves of files behind."""
    for name in ("b.wav", "A.WAV", "room/c.Wav", "room/d.wave"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        whispers.tone(tmp_path / name)
    for name in ("b.txt", "A.TXT", "room/c.txt", "room/d.txt", "room/lost.txt", "talk.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    for name in (".trash/e.wav", "._b.wav", "talk.mp3", "b.mp3", "room/g.FLAC", "room/notes.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no WAV")
    (tmp_path / "folder.wav").mkdir()
    found = read_speech(tmp_path)
    assert [(each.path.relative_to(tmp_path).as_posix(), each.domain, each.text) for each in found] == [
        ("A.WAV", "", "text of A.TXT"),
        ("b.wav", "", "text of b.txt"),
        ("room/c.Wav", "room", "text of room/c.txt"),
        ("room/d.wave", "room", "text of room/d.txt"),
    ]
    # b.mp3 is b.wav; nobody misses a picture, or a text that is asked for by nobody.
    names = [path.relative_to(tmp_path).as_posix() for path in unread_in(tmp_path)]
    assert names == ["room/g.FLAC", "talk.mp3"]
    names = [path.relative_to(tmp_path).as_posix() for path in unread_in(tmp_path, texts=True)]
    assert names == ["room/g.FLAC", "room/lost.txt", "talk.mp3"]
    assert told_unread(unread_in(tmp_path)) == (
        "g.FLAC, talk.mp3: not read, as no WAV; make them one each, as by ffmpeg -i g.FLAC g.wav"
    )
    assert told_unread([tmp_path / "lost.txt"]) == "lost.txt: no .wav of that name"
    assert told_unread([tmp_path / f"{number}.mp3" for number in range(5)]).startswith("0.mp3, 1.mp3, 2.mp3 and 2 more")
    assert told_unread([]) == ""


def test_speech_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="is no folder; speech is a folder of"):
        read_speech(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no \.wav files"):
        read_speech(tmp_path)
    (tmp_path / "a.mp3").write_bytes(b"ID3")
    with pytest.raises(DataError, match=r"has no \.wav files; a.mp3: not read, as no WAV; .* ffmpeg -i a.mp3 a.wav"):
        read_speech(tmp_path)
    whispers.tone(tmp_path / "a.wav")
    with pytest.raises(DataError, match=r"has no a.txt beside it"):
        read_speech(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"a.txt is empty; write what is said in a.wav"):
        read_speech(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is no text in UTF-8"):
        read_speech(tmp_path)
    with wave.open(str(tmp_path / "b.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
    with pytest.raises(DataError, match="has no sound in it"):
        read_sound(tmp_path / "b.wav")


def test_sound_and_text_that_are_too_long_name_the_file(base, tmp_path):
    model, words = open_whisper(base)
    whispers.tone(tmp_path / "a.wav", seconds=1.2)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a.wav lasts 1.2 s, and the model hears 1 s; cut it"):
        Speech.of(read_speech(tmp_path), model, words)
    whispers.tone(tmp_path / "a.wav")
    (tmp_path / "a.txt").write_text("a" * 50)
    with pytest.raises(DataError, match=r"the text of .*a.wav has 53 tokens with signs, and the model takes 40"):
        Speech.of(read_speech(tmp_path), model, words)


def test_what_is_heard_is_as_long_as_the_model_hears(base, tones):
    model, _ = open_whisper(base)
    feature_NMF = features_of(read_speech(tones), model)
    assert feature_NMF.shape == (6, 16, 2 * whispers.POSITIONS)
    assert not torch.equal(feature_NMF[0], feature_NMF[1])


def test_long_sound_is_cut_where_it_is_quietest():
    """By hand: of 6 s at most, the last second counts; the pause is a fifth of a second."""
    sound = torch.ones(20 * RATE)
    sound[int(5.5 * RATE) : int(5.8 * RATE)] = 0
    # Cut in the middle of the last silent fifth: from 5.6 to 5.8 s. Without any pause the last fifth of all is taken.
    cut = int(5.7 * RATE)
    assert pieces_of(sound[: 6 * RATE], 6 * RATE) == [(0, 6 * RATE)]
    assert pieces_of(sound[: 6 * RATE + 1], 6 * RATE) == [(0, cut), (cut, 6 * RATE + 1)]
    second = cut + int(5.9 * RATE)
    assert pieces_of(sound[: 12 * RATE], 6 * RATE) == [(0, cut), (cut, second), (second, 12 * RATE)]


@given(count=st.integers(1, 400), most=st.integers(1, 90), seed=st.integers(0, 99), silent=st.booleans())
def test_pieces_are_all_of_the_sound_once(count, most, seed, silent):
    sound = torch.zeros(count) if silent else torch.randn(count, generator=torch.Generator().manual_seed(seed))
    pieces = pieces_of(sound, most)
    assert (pieces[0][0], pieces[-1][1]) == (0, count)
    assert all(behind == first for (_, behind), (first, _) in itertools.pairwise(pieces))
    assert all(0 < behind - first <= most for first, behind in pieces)


# Texts and measures


def test_tokens_and_what_comes_next(base, tones):
    _, words, speech = learned(base, tones)
    text = words.encode("tone la la 2")
    assert speech.token_N[1] == (257, 258, *text)
    assert speech.target_N[1] == (IGNORED, *text, 256)
    token_NL, target_NL = speech.padded(words.end)
    assert token_NL.shape == target_NL.shape == (6, max(map(len, speech.token_N)))
    for row, (tokens, targets) in enumerate(zip(speech.token_N, speech.target_N, strict=True)):
        assert token_NL[row].tolist() == [*tokens, *[256] * (token_NL.shape[1] - len(tokens))]
        assert target_NL[row].tolist() == [*targets, *[IGNORED] * (token_NL.shape[1] - len(tokens))]


@torch.no_grad()
def test_measures_are_a_loop_over_tokens(base, tones):
    model, words, speech = learned(base, tones)
    nats = right = count = 0
    for feature_MF, tokens in zip(speech.feature_NMF, speech.token_N, strict=True):
        for place in range(len(words.start), len(tokens) + 1):
            before, following = tokens[:place], tokens[place] if place < len(tokens) else words.end
            logits = model(input_features=feature_MF[None], decoder_input_ids=torch.tensor([before])).logits[0, -1]
            nats -= float(logits.log_softmax(-1)[following])
            right += int(logits.argmax()) == following
            count += 1
    asked = []
    found = measure(model, speech, begin=asked.append)
    assert found == {
        "nats_per_token": pytest.approx(nats / count, rel=1e-5),
        "accuracy": right / count,
        "tokens": count,
    }
    assert asked == list(range(6))


@torch.no_grad()
def test_what_is_written_is_the_likeliest_each_time(base, tones):
    model, words, speech = learned(base, tones)
    feature_MF = speech.feature_NMF[3]
    first = int(
        model(input_features=feature_MF[None], decoder_input_ids=torch.tensor([words.start])).logits[0, -1].argmax()
    )
    # So that something is not to be said, and something not at the beginning.
    model.generation_config.suppress_tokens = [first, -1]
    model.generation_config.begin_suppress_tokens = [32, 256]
    tokens = list(words.start)
    for place in range(8):
        logits = model(input_features=feature_MF[None], decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
        logits[[257, 258, first, *([32, 256] if not place else [])]] = -torch.inf
        if int(logits.argmax()) == words.end:
            break
        tokens.append(int(logits.argmax()))
    assert transcribe(model, words, feature_MF, 8) == words.decode(tokens[2:])
    assert first not in tokens


# Learning


def task_of(base, tones, **fields):
    given = {"heads": HeadRouting(num_shared=1, target=0.5), "learns": "gates", **fields}
    return SpeechTask.Config(model=str(base), speech=str(tones), **given)


def run_of(base, tones, out, *, steps=3, resume=False, **fields):
    train = TrainConfig(
        steps=steps, batch_size=2, learning_rate=0.05, schedule=Constant.Config(), device="cpu", eval_every=None
    )
    trainer = Trainer(TaskRunConfig(task=task_of(base, tones, **fields), train=train), out, resume=resume)
    return trainer, trainer.fit()


def test_files_are_split_by_what_they_are(tones):
    files = read_speech(tones)
    learned, held = split(files, 0.3)
    assert len(held) == 2
    assert sorted(learned + held, key=str) == sorted(files, key=str)
    assert split(files[::-1], 0.3)[1] == held
    assert split(files, 0) == (files, [])
    assert len(split(files, 0.01)[1]) == 1
    with pytest.raises(DataError, match="1 files of speech, of which 1 are held out; give more"):
        split(files[:1], 0.5)


def test_a_batch_is_its_files_alone_and_padding_counts_for_nothing(base, tones):
    trainer, _ = run_of(base, tones, tones.parent / "padding", steps=0, validation_fraction=0.0)
    task, model = trainer.task, trainer.task.whisper.train()
    token_NL, target_NL = task.learned.padded(task.words.end)
    context = trainer._context
    whole = task.step(model, (torch.arange(6), token_NL, target_NL), context)
    routers = [heads.gate.router for heads in routed_heads_of(model).values()]
    real = sum(map(len, task.learned.token_N))
    assert [float(router.balance[0].num_pairs) for router in routers] == [3 * real] * 2
    alone = []
    for row in range(6):
        length = len(task.learned.token_N[row])
        part = task.step(
            model, (torch.tensor([row]), token_NL[row : row + 1, :length], target_NL[row : row + 1, :length]), context
        )
        alone.append(part.terms["text"].item())
    assert whole.terms["text"].item() == pytest.approx(sum(alone) / 6, rel=1e-5)


def test_gates_alone_learn_and_the_rest_stays(base, tones, tmp_path):
    trainer, result = run_of(base, tones, tmp_path / "run", steps=4)
    assert result.status == "finished"
    task = trainer.task
    before, _ = open_whisper(base)
    held = {
        name.replace("encoder_attn.attention.", "encoder_attn."): value
        for name, value in task.whisper.state_dict().items()
    }
    for name, value in before.state_dict().items():
        assert torch.equal(held[name], value), name
    gates = [value for name, value in held.items() if ".gate.router.score.weight" in name]
    assert len(gates) == 2
    assert all(value.abs().max() > 0 for value in gates)
    assert task.before["nats_per_token"] == pytest.approx(measure(before, task.held_out)["nats_per_token"], abs=1e-6)
    assert sum(file.stat().st_size for file in (tmp_path / "run/checkpoints").rglob("model.safetensors")) < 20_000


def test_all_of_it_learns_where_that_is_wanted(base, tones, tmp_path):
    trainer, _ = run_of(base, tones, tmp_path / "run", learns="all")
    before, _ = open_whisper(base)
    held = trainer.task.whisper.state_dict()
    assert not torch.equal(held["model.encoder.conv1.weight"], before.state_dict()["model.encoder.conv1.weight"])


@pytest.mark.parametrize("learns", ["gates", "all"])
def test_a_run_that_stopped_is_the_run_that_went_on(base, tones, tmp_path, learns):
    straight, _ = run_of(base, tones, tmp_path / "straight", steps=4, learns=learns)
    run_of(base, tones, tmp_path / "stopped", steps=2, learns=learns)
    again, result = run_of(base, tones, tmp_path / "stopped", steps=4, resume=True, learns=learns)
    assert result.step == 4
    wanted = straight.task.whisper.state_dict()
    for name, value in again.task.whisper.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=0, msg=name)


def test_gates_of_another_whisper_are_not_taken_up(tones, tmp_path):
    whispers.folder(tmp_path / "base")
    run_of(tmp_path / "base", tones, tmp_path / "run", steps=2)
    whispers.folder(tmp_path / "base", whispers.drawn(init_std=0.2))
    with pytest.raises(CheckpointError, match=r"are of another Whisper than .*base is now"):
        run_of(tmp_path / "base", tones, tmp_path / "run", steps=4, resume=True)


def test_what_is_saved_is_the_model_with_its_heads(base, tones, tmp_path):
    trainer, _ = run_of(base, tones, tmp_path / "run")
    task = trainer.task
    wanted = measure(task.whisper, task.learned)
    save_whisper(tmp_path / "saved", task.whisper, base / "tokenizer.json")
    model, words = open_whisper(tmp_path / "saved")
    assert measure(model, task.learned) == pytest.approx(wanted, rel=1e-6)
    assert sorted(routed_heads_of(model)) == [f"model.decoder.layers.{layer}.encoder_attn" for layer in (0, 1)]
    assert words.start == task.words.start
    # Over itself too, and with nothing of before left.
    save_whisper(tmp_path / "saved", model, base / "tokenizer.json")
    assert measure(open_whisper(tmp_path / "saved")[0], task.learned) == pytest.approx(wanted, rel=1e-6)


@torch.no_grad()
def test_what_was_heard_once_is_what_is_heard_each_time(base, tones):
    model, _, speech = learned(base, tones)
    put_heads(model, 1, where=CROSS)
    together = model.get_encoder()(speech.feature_NMF).last_hidden_state
    torch.testing.assert_close(listened(model, speech.feature_NMF), together, atol=1e-5, rtol=1e-5)


def test_other_attentions_can_be_routed(base, tones, tmp_path):
    trainer, _ = run_of(base, tones, tmp_path / "run", steps=1, where=("model.encoder.layers.*.self_attn",))
    assert [told["name"] for told in head_report(trainer.task.whisper)] == [
        f"model.encoder.layers.{n}.self_attn" for n in (0, 1)
    ]
    with pytest.raises(ConfigError, match="no attention of this WhisperForConditionalGeneration fits"):
        run_of(base, tones, tmp_path / "none", where=("nowhere",))


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_what_is_real_is_all_up_to_the_last_target(lengths):
    from anabranch.heads.whisper.task import _real

    target = np.full((len(lengths), 8), IGNORED)
    for row, length in enumerate(lengths):
        target[row, 1 : 1 + length] = 5
    assert _real(torch.from_numpy(target)).sum(1).tolist() == [1 + length for length in lengths]


@torch.no_grad()
def test_what_is_written_of_long_sound_is_that_of_its_pieces(base, tmp_path):
    model, words = open_whisper(base)
    sound = torch.randn(int(2.5 * RATE), generator=torch.Generator().manual_seed(3)) * 0.1
    begun = []
    found = transcribe_sound(model, words, sound, begin=begun.append)
    cuts = pieces_of(sound, RATE)
    assert len(cuts) == len(found) > 2
    assert begun == [piece.start_s for piece in found]
    for (first, behind), piece in zip(cuts, found, strict=True):
        assert (piece.start_s, piece.end_s) == (first / RATE, behind / RATE)
        assert piece.text == transcribe(model, words, feature_of(sound[first:behind], model))
        assert piece.silence is None
    assert len({piece.text for piece in found}) > 1


@torch.no_grad()
def test_how_likely_a_text_and_silence_are(tmp_path):
    """A naive loop without a cache, of a model that has a sign for silence."""
    from dataclasses import replace

    model, words = open_whisper(whispers.folder(tmp_path / "base"))
    words = replace(words, silence=7)
    feature_MF = torch.randn(16, 100, generator=torch.Generator().manual_seed(5))
    written = write(model, words, feature_MF, most=5)
    tokens, logprobs = list(words.start), []
    for place in range(5):
        logits_LV = model(input_features=feature_MF[None], decoder_input_ids=torch.tensor([tokens])).logits[0]
        if not place:
            assert written.silence == pytest.approx(float(logits_LV[0].softmax(-1)[7]), rel=1e-4)
        logits_LV[-1, words.end + 1 :] = -torch.inf
        logprob, token = logits_LV[-1].log_softmax(-1).max(0)
        logprobs.append(float(logprob))
        if int(token) == words.end:
            break
        tokens.append(int(token))
    assert written.text == words.decode(tokens[2:])
    assert written.logprob == pytest.approx(sum(logprobs) / len(logprobs), rel=1e-4)


@pytest.mark.parametrize(
    ("silence", "logprob", "is_silent"),
    [(0.61, -1.01, True), (0.6, -1.01, False), (0.61, -1.0, False), (None, -9.0, False)],
)
def test_nobody_speaks_where_both_say_so(silence, logprob, is_silent):
    assert Written("you", logprob, silence).is_silent == is_silent


def test_a_piece_in_which_nobody_speaks_is_empty(base, monkeypatch):
    from anabranch.heads.whisper import writing

    model, words = open_whisper(base)
    monkeypatch.setattr(writing, "write", lambda *_: Written("you", -2.0, 0.9))
    [piece] = transcribe_sound(model, words, torch.linspace(0, 1e-3, RATE // 2))
    assert (piece.text, piece.silence) == ("", 0.9)
    # Where there is no sound at all nobody is asked.
    monkeypatch.setattr(writing, "write", lambda *_: pytest.fail("asked"))
    for level in (0.0, 0.25):
        [piece] = transcribe_sound(model, words, torch.full((RATE // 2,), level))
        assert (piece.text, piece.silence) == ("", 1.0)
