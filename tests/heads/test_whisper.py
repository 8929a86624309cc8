"""Routed heads of a Whisper: files of CTranslate2, sound, texts as tokens, what is measured, and how heads learn."""

import contextlib
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
from anabranch.heads.whisper.sound import RATE, features_of, read_sound, resampled
from anabranch.heads.whisper.task import IGNORED, listened, split
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
            "in fewer bits than are read here; convert the model with --quantization float16",
        ),
        ({"decoder/layer_1/ffn/linear_0/weight": torch.ones(39, 32)}, r"model.decoder.layers.1.fc1.weight is \[39, 32\]"),
    ],
)  # fmt: skip
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
        (SMALL.replace(struct.pack("<III", 2, 3, 24)[:8], struct.pack("<II", 2**31, 2**31)), r"a/b of shape \[2147483648"),
    ],
)  # fmt: skip
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


def test_speech_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="is no folder; speech is a folder of"):
        read_speech(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no \.wav files"):
        read_speech(tmp_path)
    path = whispers.tone(tmp_path / "a.wav")
    with pytest.raises(DataError, match=r"has no a.txt beside it"):
        read_speech(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"a.txt is empty; write what is said in a.wav"):
        read_speech(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is no text in UTF-8"):
        read_speech(tmp_path)
    for held, message in (
        (b"", "cannot read"),
        (b"RIFF" + bytes(60), "cannot read"),
        (path.read_bytes()[:20], "cannot read"),
    ):
        (tmp_path / "b.wav").write_bytes(held)
        with pytest.raises(DataError, match=message):
            read_sound(tmp_path / "b.wav")
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
