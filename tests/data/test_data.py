"""The whole path: config, corpus, tokenizer, store, stream and windows."""

import json
import pickle

import pytest
import torch

from anabranch.config import from_dict, override, to_dict
from anabranch.data import (
    BpeTokenizer,
    ByteTokenizer,
    Data,
    DataConfig,
    Domain,
    Files,
    Mixture,
    Stdlib,
    Table,
    corpus_windows,
)
from anabranch.errors import ConfigError, DataError


@pytest.fixture
def config(texts):
    return DataConfig(corpus=Files.Config(paths=(str(texts),)), sequence_length=16, validation_fraction=0.2)


def test_the_default_is_the_standard_library_in_bytes():
    config = DataConfig()
    assert config == DataConfig(
        corpus=Stdlib.Config(), tokenizer=ByteTokenizer.Config(), sequence_length=256, validation_fraction=0.05
    )
    data = config.replace(corpus=Stdlib.Config(max_bytes=400_000, include_docs=False)).build()
    assert isinstance(data, Data)
    assert data.domains == ("code",)
    batch = data.train(seed=0).next_batch(4)
    assert batch.token_BL.shape == (4, 256)
    assert sum(data.num_bytes("train").values()) + sum(data.num_bytes("validation").values()) <= 400_000


def test_the_config_reads_back_equal(config):
    config = config.replace(tokenizer=BpeTokenizer.Config(vocab_size=300))
    assert from_dict(DataConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert override(config, {"corpus.kind": "stdlib", "corpus.max_bytes": 5}).corpus == Stdlib.Config(max_bytes=5)


def test_training_sees_only_training_text_and_validation_the_rest(config, texts):
    data = config.build()
    joined = {side: "".join(file.read_text() for file in texts.rglob("*.txt")) for side in ("train",)}["train"]
    ids = {"train": set(), "validation": set()}
    stream = data.train(seed=0)
    for row in stream.next_batch(stream.num_windows * 2).token_BL.tolist():
        ids["train"].update(line for line in data.tokenizer.decode(row).split("\n") if line.startswith("file"))
    for batch in data.validation():
        for row in batch.token_BL.tolist():
            ids["validation"].update(line for line in data.tokenizer.decode(row).split("\n") if line.startswith("file"))
    assert joined.count("file") == 60
    names = {side: {line.split(":")[0] for line in lines if ":" in line} for side, lines in ids.items()}
    assert names["train"]
    assert names["validation"]
    assert not names["train"] & names["validation"]


def test_validation_predicts_all_of_the_split(config):
    data = config.build()
    windows = data.validation(batch_size=3)
    assert windows.num_tokens == sum(data.num_tokens("validation").values()) - 2  # the first, and the last end of text
    assert windows.num_bytes == sum(data.num_bytes("validation").values()) - 1
    assert sum(batch.target_BL.numel() for batch in windows) == windows.num_tokens
    assert sum(int(batch.byte_length_BL.sum()) for batch in windows) == windows.num_bytes
    assert len(data.validation(sequence_length=8)) > len(windows)
    assert data.windows("train").num_tokens == sum(data.num_tokens("train").values()) - 2


def test_a_mixture_carries_its_domains_from_config_to_batch(config, texts, tmp_path):
    rows = [{"text": f"row {number} " + "abc" * 20} for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    inner = Mixture.Config(
        domains={
            "odd": Domain(corpus=Files.Config(paths=(str(texts / "odd"),))),
            "even": Domain(corpus=Files.Config(paths=(str(texts / "even"),))),
        }
    )
    mixture = Mixture.Config(
        domains={
            "files": Domain(corpus=inner, weight=1.0),
            "rows": Domain(corpus=Table.Config(paths=(str(tmp_path / "rows.jsonl"),)), weight=3.0),
        }
    )
    data = config.replace(corpus=mixture).build()
    assert data.domains == ("files", "rows")
    stream = data.train(seed=0)
    assert stream.domains == data.domains
    batch = stream.next_batch(4096)
    assert batch.domain_B.bincount().tolist() == [1024, 3072]
    for row, domain in zip(batch.token_BL[:50].tolist(), batch.domain_B[:50].tolist(), strict=True):
        assert ("abcabc" in data.tokenizer.decode(row)) <= (domain == 1)
    counts = torch.zeros(2, dtype=torch.int64)
    for part in data.validation():
        counts.index_add_(0, part.domain_B, part.byte_length_BL.sum(1))
    assert (counts > 0).all()
    # two runs of tokens make up "files", so two first tokens go unpredicted there, and one in "rows"
    assert counts.tolist() == [data.num_bytes("validation")["files"] - 2, data.num_bytes("validation")["rows"] - 1]


def test_labels_of_a_table_are_domains_where_there_is_no_mixture(config, tmp_path):
    rows = [{"text": f"row {number} " + "abc" * 20, "topic": "ab"[number % 2]} for number in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = config.replace(corpus=Table.Config(paths=(str(tmp_path / "rows.jsonl"),), label_column="topic")).build()
    assert data.domains == ("a", "b")
    assert set(data.train(seed=0).next_batch(50).domain_B.tolist()) == {0, 1}


def test_streams_resume_across_builds_and_refuse_other_text(config, texts):
    stream = config.build().train(seed=3)
    stream.next_batch(7)
    state = json.loads(json.dumps(stream.state_dict()))
    again = config.build().train(seed=3)
    again.load_state_dict(state)
    assert torch.equal(again.next_batch(5).token_BL, stream.next_batch(5).token_BL)
    (texts / "new.txt").write_text("more text")
    with pytest.raises(DataError, match="fingerprint was"):
        config.build().train(seed=3).load_state_dict(state)


def test_streams_can_be_pickled_in_mid_run(config):
    stream = config.build().train(seed=3)
    stream.next_batch(7)
    copy = pickle.loads(pickle.dumps(stream))
    assert torch.equal(copy.next_batch(5).token_BL, stream.next_batch(5).token_BL)


def test_a_trained_tokenizer_is_kept_in_the_cache_and_made_again_if_damaged(config, cache):
    config = config.replace(tokenizer=BpeTokenizer.Config(vocab_size=280))
    first = config.build()
    assert 257 < first.tokenizer.vocab_size <= 280
    [file] = (cache / "tokenizers").glob("*/tokenizer.json")
    stamp = file.stat().st_mtime_ns
    assert config.build().tokenizer.fingerprint == first.tokenizer.fingerprint
    assert file.stat().st_mtime_ns == stamp
    for damage in ("{", file.read_text().replace('"content": "<|endoftext|>"', '"content": "<|endoftexu|>"')):
        file.write_text(damage)  # the second is readable, and another tokenizer
        assert config.build().tokenizer.fingerprint == first.tokenizer.fingerprint


def test_a_tokenizer_can_be_handed_in(config):
    trained = config.replace(tokenizer=BpeTokenizer.Config(vocab_size=280)).build().tokenizer
    data = config.build(trained)
    assert data.tokenizer is trained
    assert sum(data.num_tokens("train").values()) < sum(config.build().num_tokens("train").values())


def test_windows_over_a_whole_corpus_leave_nothing_out(texts):
    corpus = Files.Config(paths=(str(texts),), label_by="folder").build()
    windows = corpus_windows(corpus, ByteTokenizer(), 16)
    assert windows.domains == ("even", "odd")
    assert windows.num_bytes == sum(file.stat().st_size for file in texts.rglob("*.txt")) - 2


def test_errors_name_what_is_wrong(config, tmp_path):
    with pytest.raises(DataError, match=r"no corpus at nowhere; name a file or folder of text"):
        config.replace(corpus=Files.Config(paths=("nowhere",))).build()
    with pytest.raises(DataError, match=r"the training split of texts has .* tokens, but a sequence needs 100001"):
        config.replace(sequence_length=100_000).build().train(seed=0)
    with pytest.raises(DataError, match=r"the validation split is empty; validation_fraction is 0.0"):
        config.replace(validation_fraction=0.0).build().validation()
    with pytest.raises(ConfigError, match="validation_fraction"):
        DataConfig(validation_fraction=1.0)
    with pytest.raises(ConfigError, match="sequence_length"):
        DataConfig(sequence_length=0)
