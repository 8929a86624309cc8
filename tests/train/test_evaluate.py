import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anabranch.data import ByteTokenizer, DataConfig, Domain, Files, Mixture, text_windows
from anabranch.lm import Decoder
from anabranch.train import Evaluation, evaluate
from ranks import run_ranks


class Uniform(nn.Module):
    """Gives every token the same probability."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, token_BL):
        return SimpleNamespace(logits_BLV=self.weight.expand(*token_BL.shape, -1))


TEXTS = ["Where the river forks,", " é", "it joins again."]


def test_uniform_model_by_hand():
    tokenizer = ByteTokenizer.Config().build()
    windows = text_windows(TEXTS, tokenizer, 8)
    result = evaluate(Uniform(257), windows)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    tokens = num_bytes + 2 - 1  # two ends of text between three texts; the first token is not predicted
    assert result.tokens == tokens
    assert result.bytes == num_bytes - 1
    assert result.nats_per_token == pytest.approx(math.log(257), abs=1e-6)
    assert result.bits_per_byte == pytest.approx(math.log2(257) * tokens / (num_bytes - 1), abs=1e-6)
    assert result.by_domain == {}


def test_windows_start_afresh_and_the_last_is_short(dense_model):
    tokenizer = ByteTokenizer.Config().build()
    model = Decoder(dense_model, seed=1)
    ids = torch.tensor(tokenizer.encode("abcdefghijklmnopqrs"))  # 19 ids: windows of 8, 8 and 2 inputs
    total = 0.0
    for start in (0, 8, 16):
        window = ids[start : start + 9]
        logits = model(window[None, :-1]).logits_BLV[0]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    model.train()
    result = evaluate(model, text_windows(["abcdefghijklmnopqrs"], tokenizer, 8))
    assert result.tokens == 18
    assert result.nats_per_token == pytest.approx(total / 18, abs=1e-5)
    assert model.training  # as it was


def test_batching_changes_nothing(dense_model):
    tokenizer = ByteTokenizer.Config().build()
    model = Decoder(dense_model)
    one, many = (evaluate(model, text_windows(TEXTS * 9, tokenizer, 8, batch_size=size)) for size in (1, 16))
    assert one.nats_per_token == pytest.approx(many.nats_per_token, abs=1e-6)


def test_by_domain_adds_up(dense_model, tmp_path):
    paths = {}
    for name, text in (("digits", "0123456789" * 400), ("letters", "abcdefghij" * 200)):
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_text(text)
    domains = {name: Domain(corpus=Files.Config(paths=(str(path),))) for name, path in paths.items()}
    data = DataConfig(corpus=Mixture.Config(domains=domains), sequence_length=16, validation_fraction=0.2).build()
    result = evaluate(Decoder(dense_model), data.validation())
    assert set(result.by_domain) == {"digits", "letters"}
    assert sum(part.tokens for part in result.by_domain.values()) == result.tokens
    assert sum(part.bytes for part in result.by_domain.values()) == result.bytes
    nats = sum(part.nats_per_token * part.tokens for part in result.by_domain.values())
    assert nats / result.tokens == pytest.approx(result.nats_per_token)
    assert Evaluation.from_dict(result.to_dict()) == result


def test_bfloat16_is_close(dense_model):
    tokenizer = ByteTokenizer.Config().build()
    model = Decoder(dense_model)
    wide, narrow = (
        evaluate(model, text_windows(TEXTS, tokenizer, 8), precision=precision) for precision in ("float32", "bfloat16")
    )
    assert narrow.nats_per_token != wide.nats_per_token
    assert narrow.nats_per_token == pytest.approx(wide.nats_per_token, rel=0.02)  # 8 bits of mantissa


def test_ranks_with_fewer_batches_go_along_with_a_model_that_communicates(tmp_path):
    script = """
from types import SimpleNamespace
from torch import nn
from anabranch.data import ByteTokenizer, text_windows
from anabranch.train import evaluate

class Talks(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(257))
    def forward(self, token_BL):
        parts = [torch.zeros(5) for _ in range(world)]
        dist.all_gather(parts, torch.full((5,), float(rank)))
        assert [int(part[0]) for part in parts] == list(range(world))
        return SimpleNamespace(logits_BLV=self.weight.expand(*token_BL.shape, -1))

text = "abcdefgh" * (6 if rank == 0 else 2)
found = evaluate(Talks(), text_windows([text], ByteTokenizer.Config().build(), 8, batch_size=1), equal_passes=True)
print(found.tokens, found.bytes)
"""
    assert run_ranks(script) == ["62 62\n"] * 2  # 47 + 15: the first token of a text is not predicted
