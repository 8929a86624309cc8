import mmap
import os
import pickle
import shutil
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.data.corpus import Corpus, Document, Files
from anabranch.data.split import split_of
from anabranch.data.store import FORMAT, TokenStore
from anabranch.data.tokenizer import ByteTokenizer
from anabranch.errors import DataError
from anabranch.places import cache_folder
from tokenizers_of_every_make import ALL, LOSSLESS, by_name

BYTES = ByteTokenizer()


def opened(folder, tokenizer=BYTES, fraction=0.2, **fields):
    return TokenStore.open(Files.Config(paths=(str(folder),), **fields).build(), tokenizer, fraction)


def test_documents_of_a_label_lie_together_with_end_of_text_after_each(tmp_path):
    for name, text in {"b/1": "xy", "a/2": "z", "b/0": "w"}.items():
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_text(text)
    store = opened(tmp_path / "t", fraction=0.0, label_by="folder")
    assert store.tokens("train").tolist() == [ord("z"), 256, ord("w"), 256, ord("x"), ord("y"), 256]
    assert [(s.label, s.start, s.length, s.size_bytes, s.documents) for s in store.segments["train"]] == [
        ("a", 0, 2, 1, 1),
        ("b", 2, 5, 3, 2),
    ]
    assert store.segments["validation"] == ()
    assert store.tokens("validation").tolist() == []
    assert store.byte_lengths("train", 0, 7).tolist() == [1, 0, 1, 0, 1, 1, 0]


def test_both_splits_together_hold_every_document(texts):
    store = opened(texts)
    expected = {side: [] for side in ("train", "validation")}
    for file in sorted(texts.rglob("*.txt"), key=lambda file: file.relative_to(texts).as_posix()):
        expected[split_of(file.relative_to(texts).as_posix(), 0.2)] += [*file.read_bytes(), 256]
    for side, ids in expected.items():
        assert store.tokens(side).tolist() == ids
        assert store.tokens(side).dtype == np.uint16


@by_name
def test_byte_counts_are_exact_for_every_tokenizer(name, tmp_path):
    text = "The cats sat; Zoë e\u0301 日本語 🎉\n" * 20
    for number in range(30):
        (tmp_path / "t" / f"{number}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "t" / f"{number}.txt").write_text(text)
    store = opened(tmp_path / "t", ALL[name])
    assert (store.folder / "train.lengths.bin").exists() == (name not in LOSSLESS)
    total = 0
    for side in ("train", "validation"):
        [segment] = store.segments[side]
        length = store.byte_lengths(side, segment.start, segment.start + segment.length)
        assert len(length) == len(store.tokens(side))
        assert length.sum() == segment.size_bytes
        total += segment.size_bytes
    assert total == 30 * len(text.encode())


@by_name
def test_content_tells_apart_whatever_is_measured_otherwise(name, tmp_path):
    """Whoever normalises gives NFC and NFD the same tokens, with other bytes under them."""
    stores = {}
    for form in ("NFC", "NFD"):
        (tmp_path / form).mkdir()
        (tmp_path / form / "a.txt").write_text(unicodedata.normalize(form, "Zoë, naïve Å the cat\n" * 20))
        stores[form] = opened(tmp_path / form, ALL[name], fraction=0.0, label="t")
    one, two = stores["NFC"], stores["NFD"]
    same_tokens = one.tokens("train").tolist() == two.tokens("train").tolist()
    assert (one.content("train", byte_lengths=False) == two.content("train", byte_lengths=False)) is same_tokens
    assert same_tokens is (name in ("qwen", "bert"))
    assert one.segments["train"][0].size_bytes != two.segments["train"][0].size_bytes
    assert one.content("train") != two.content("train")
    # Where nothing is normalised tokens say it all, and what was named before is named alike.
    alike = one.content("train") == one.content("train", byte_lengths=False)
    assert alike is (name in LOSSLESS)


def test_long_documents_in_stretches_are_tokenised_as_in_one_piece(tmp_path):
    text = "".join(f"line {number} the cat\n\n  x\n" for number in range(60_000))
    assert len(text) > 1 << 20
    (tmp_path / "a.txt").write_text(text)
    tokenizer = ALL["bpe"]
    store = opened(tmp_path / "a.txt", tokenizer, fraction=0.0)
    assert store.tokens("train").tolist() == [*tokenizer.encode(text), tokenizer.eos_id]


def test_a_large_vocabulary_takes_four_bytes_a_token(texts):
    class Wide(ByteTokenizer):
        vocab_size = 70_000
        fingerprint = "wide"

    assert opened(texts, Wide()).tokens("train").dtype == np.uint32


class Counted(Corpus):
    """Counts how often it is read."""

    def __init__(self):
        super().__init__(Corpus.Config())
        self.reads = 0

    def sources(self):
        return []

    def describe(self):
        return "counted"

    def _read(self):
        self.reads += 1
        yield from (Document(str(number), f"text {number}\n" * 5, "text") for number in range(30))


def test_the_second_opening_reads_nothing():
    corpus = Counted()
    first = TokenStore.open(corpus, BYTES, 0.2)
    reads = corpus.reads
    second = TokenStore.open(corpus, BYTES, 0.2)
    assert corpus.reads == reads > 0
    assert second.folder == first.folder
    assert second.tokens("train").tolist() == first.tokens("train").tolist()
    assert TokenStore.open(corpus, ALL["bpe"], 0.2).folder != first.folder
    assert TokenStore.open(corpus, BYTES, 0.3).folder != first.folder


@pytest.mark.parametrize("damage", ["truncate", "empty index", "half an index", "delete", "other format"])
def test_a_damaged_cache_entry_is_made_again(damage, texts):
    before = opened(texts)
    expected = before.tokens("train").tolist()
    index, tokens = before.folder / "index.json", before.folder / "train.bin"
    if damage == "truncate":
        os.truncate(tokens, tokens.stat().st_size // 2)
    elif damage == "delete":
        tokens.unlink()
    elif damage == "other format":
        index.write_text(index.read_text().replace(f'"format": {FORMAT}', '"format": 0'))
    else:
        index.write_text("" if damage == "empty index" else index.read_text()[:50])
    with pytest.raises(DataError, match="is damaged or gone; delete what is left"):
        TokenStore(before.folder, BYTES)
    assert opened(texts).tokens("train").tolist() == expected


@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", ["bytes", "bert"])
def test_one_flipped_bit_anywhere_in_an_entry_is_noticed(data, name, texts):
    tokenizer = ALL[name]
    before = opened(texts, tokenizer)
    expected = [before.tokens(side).tolist() for side in ("train", "validation")]
    lengths = before.byte_lengths("train", 0, 50).tolist()
    file = data.draw(st.sampled_from(sorted(before.folder.iterdir())))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.unlink()  # what is open must not change under it
    file.write_bytes(content)
    after = opened(texts, tokenizer)
    assert [after.tokens(side).tolist() for side in ("train", "validation")] == expected
    assert after.byte_lengths("train", 0, 50).tolist() == lengths
    assert after.segments == before.segments
    assert after.content("train") == before.content("train")


def test_an_open_store_needs_the_cache_no_more(texts):
    store = opened(texts)
    shutil.rmtree(cache_folder())
    assert store.tokens("train").tolist() == opened(texts).tokens("train").tolist()
    assert store.tokens("validation").tolist() == opened(texts).tokens("validation").tolist()


@pytest.mark.parametrize(
    "damage", [lambda file: os.truncate(file, 0), lambda file: file.write_bytes(b"\0" * file.stat().st_size)]
)
def test_nothing_that_is_done_to_the_files_of_the_cache_reaches_an_open_store(texts, damage):
    store = opened(texts)
    expected = {side: store.tokens(side).tolist() for side in ("train", "validation")}
    assert not any(is_mapped(store.tokens(side)) for side in expected)  # else the system ends this process now
    for side in expected:
        damage(store.folder / f"{side}.bin")
    assert {side: store.tokens(side).tolist() for side in expected} == expected


def test_large_files_are_mapped_and_outlive_being_deleted_or_replaced(texts, monkeypatch):
    expected = opened(texts).tokens("train").tolist()
    monkeypatch.setattr("anabranch.data.store._MOST_HELD", 0)
    store = opened(texts)
    assert is_mapped(store.tokens("train"))
    (store.folder / "other").write_bytes(b"\0" * 8)
    (store.folder / "other").replace(store.folder / "train.bin")
    shutil.rmtree(store.folder)
    assert store.tokens("train").tolist() == expected


def is_mapped(array):
    while array is not None:
        if isinstance(array, mmap.mmap | np.memmap):
            return True
        array = getattr(array, "base", None)
    return False


def test_a_pickled_store_says_that_its_cache_is_gone(texts):
    store = opened(texts)
    pickled = pickle.dumps(store)
    shutil.rmtree(cache_folder())
    with pytest.raises(DataError, match="is damaged or gone"):
        pickle.loads(pickled)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_cache_that_is_deleted_while_it_is_made_is_made_again(times, texts, monkeypatch):
    left = [times]
    encode = ByteTokenizer.encode_with_byte_lengths

    def meanwhile(self, texts):
        if left[0]:
            left[0] -= 1
            shutil.rmtree(cache_folder())
        return encode(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_with_byte_lengths", meanwhile)
    if times == 3:
        with pytest.raises(DataError, match="cannot write"):
            opened(texts)
    else:
        assert len(opened(texts).tokens("train"))


def test_a_build_that_fails_leaves_no_entry(texts, monkeypatch):
    def fail(self, texts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ByteTokenizer, "encode_with_byte_lengths", fail)
        with pytest.raises(KeyboardInterrupt):
            opened(texts)
    assert list((cache_folder() / "tokens").iterdir()) == []
    assert len(opened(texts).tokens("train"))


def test_pickled_stores_hold_no_tokens_and_read_the_same(texts):
    store = opened(texts)
    expected = store.tokens("train").tolist()
    pickled = pickle.dumps(store)
    assert len(pickled) < len(expected)
    assert pickle.loads(pickled).tokens("train").tolist() == expected


def test_of_those_that_open_at_once_only_one_builds():
    corpora = [Counted() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:  # the lock is held per open file, so threads stand for processes
        stores = list(pool.map(lambda corpus: TokenStore.open(corpus, BYTES, 0.2), corpora))
    assert sorted(corpus.reads for corpus in corpora) == [0, 0, 0, 2]
    assert len({str(store.tokens("train").tolist()) for store in stores}) == 1


def test_a_cache_that_cannot_be_written(texts, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot write the cache .*; set ANABRANCH_CACHE to a folder of yours"):
        opened(texts)
