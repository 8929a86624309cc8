"""Small Whispers that have learned nothing, in the folders of transformers and of CTranslate2, and speech for them: tones."""

import math
import struct
import wave

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SIGNS = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")
VOCAB = 256 + len(SIGNS)
END, START, PLAIN = 256, 257, 258
# Of a second of sound, which is all that it hears.
POSITIONS = 50


def drawn(**changes):
    import transformers

    torch.manual_seed(1)
    sizes = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 40,
        "max_source_positions": POSITIONS,
        "max_target_positions": 40,
        "num_mel_bins": 16,
        "pad_token_id": END,
        "bos_token_id": END,
        "eos_token_id": END,
        "decoder_start_token_id": START,
        "init_std": 0.3,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes | changes)).eval()


def words(path, signs=SIGNS):
    """Every byte is a token, and so is every sign."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(signs))
    made.save(str(path))


def folder(place, model=None):
    """As transformers saves it."""
    (model or drawn()).save_pretrained(place)
    words(place / "tokenizer.json")
    return place


def variable(name, tensor):
    """A variable of CTranslate2's file."""
    kinds = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4}
    held = tensor.contiguous().numpy().tobytes()
    shape = b"".join(struct.pack("<I", size) for size in tensor.shape)
    return (
        text(name) + bytes([tensor.dim()]) + shape + bytes([kinds[tensor.dtype]]) + struct.pack("<I", len(held)) + held
    )


def text(name):
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def packed(model, dtype=torch.float32):
    """Variables of CTranslate2, by name: projections that stand together are one."""
    state, made = {name: value.detach() for name, value in model.state_dict().items()}, {}

    def linear(theirs, *parts):
        weights = [state[f"{part}.weight"] for part in parts]
        made[f"{theirs}/weight"] = torch.cat(weights)
        made[f"{theirs}/bias"] = torch.cat(
            [state.get(f"{part}.bias", torch.zeros(len(weight))) for part, weight in zip(parts, weights, strict=True)]
        )

    def norm(theirs, ours):
        made[f"{theirs}/gamma"], made[f"{theirs}/beta"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    for stack, layers in (("encoder", model.config.encoder_layers), ("decoder", model.config.decoder_layers)):
        made[f"{stack}/position_encodings/encodings"] = state[f"model.{stack}.embed_positions.weight"]
        norm(f"{stack}/layer_norm", f"model.{stack}.layer_norm")
        for layer in range(layers):
            ours, theirs = f"model.{stack}.layers.{layer}", f"{stack}/layer_{layer}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            linear(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{one}_proj" for one in "qkv"))
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            if stack == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                linear(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                linear(f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{one}_proj" for one in "kv"))
                linear(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    for number in (1, 2):
        linear(f"encoder/conv{number}", f"model.encoder.conv{number}")
    made["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    made = {name: value.to(dtype) for name, value in made.items()}
    for stack in ("encoder", "decoder"):
        made[f"{stack}/num_heads"] = torch.tensor(model.config.encoder_attention_heads, dtype=torch.int16)
    return made


def file_of(variables, *, spec="WhisperSpec"):
    """The bytes of ``model.bin``."""
    head = struct.pack("<I", 6) + text(spec) + struct.pack("<II", 3, len(variables))
    return head + b"".join(variable(name, value) for name, value in variables.items()) + struct.pack("<I", 0)


def ctranslate2_folder(place, model=None, dtype=torch.float32):
    """As CTranslate2 saves it."""
    place.mkdir()
    (place / "model.bin").write_bytes(file_of(packed(model or drawn(), dtype)))
    (place / "config.json").write_text('{"suppress_ids": [7, 8], "suppress_ids_begin": [32, 256]}')
    words(place / "tokenizer.json")
    return place


def tone(path, *, hertz=440.0, seconds=0.3, rate=16_000, width=2, channels=1, amplitude=0.5):
    """A WAV file of a tone, the same in each channel."""
    at = np.arange(round(seconds * rate)) / rate
    value = amplitude * np.sin(2 * math.pi * hertz * at)
    if width == 1:
        held = (np.round(value * 128) + 128).astype(np.uint8).tobytes()
    else:
        whole = np.round(value * 2 ** (8 * width - 1)).astype("<i8").view(np.uint8).reshape(-1, 8)
        held = whole[:, :width].tobytes()
    parts = np.frombuffer(held, np.uint8).reshape(-1, width)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.repeat(parts, channels, axis=0).tobytes())
    return path


def speech(place, count=6):
    """Tones, each called by a word, in two folders."""
    for number in range(count):
        room = place / ("low" if number % 2 else "high")
        room.mkdir(parents=True, exist_ok=True)
        tone(room / f"{number}.wav", hertz=200.0 + 300 * number, seconds=0.2 + 0.05 * number)
        (room / f"{number}.txt").write_text(f"tone {'la ' * (number % 3)}{number}\n")
    return place
