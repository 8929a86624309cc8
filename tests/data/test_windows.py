import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.data.config import text_windows
from anabranch.data.tokenizer import ByteTokenizer
from anabranch.errors import DataError
from tokenizers_of_every_make import ALL, by_name

BYTES = ByteTokenizer()


def collected(windows):
    """All (input, target, bytes) of the windows, in order."""
    triples = []
    for batch in windows:
        for row in range(len(batch.token_BL)):
            triples += zip(
                batch.token_BL[row].tolist(),
                batch.target_BL[row].tolist(),
                batch.byte_length_BL[row].tolist(),
                strict=True,
            )
    return triples


def test_windows_by_hand():
    # "abcdef", L = 2: inputs ab, cd, e predict bc, de, f
    batches = list(text_windows(["abcdef"], BYTES, 2, batch_size=4))
    assert [batch.token_BL.tolist() for batch in batches] == [[[97, 98], [99, 100]], [[101]]]
    assert [batch.target_BL.tolist() for batch in batches] == [[[98, 99], [100, 101]], [[102]]]
    assert all(torch.equal(batch.byte_length_BL, torch.ones_like(batch.target_BL)) for batch in batches)


def test_end_of_text_stands_between_documents_and_counts_no_bytes():
    windows = text_windows(["ab", "c"], BYTES, 8)
    assert collected(windows) == [(97, 98, 1), (98, 256, 0), (256, 99, 1)]
    assert (windows.num_tokens, windows.num_bytes, len(windows)) == (3, 2, 1)


@given(st.integers(2, 50), st.integers(1, 12), st.integers(1, 5))
def test_every_token_but_the_first_is_predicted_once(size, length, batch_size):
    text = "".join(chr(97 + number % 26) for number in range(size))
    windows = text_windows([text], BYTES, length, batch_size=batch_size)
    triples = collected(windows)
    assert bytes(token for token, _, _ in triples).decode() == text[:-1]
    assert bytes(target for _, target, _ in triples).decode() == text[1:]
    assert windows.num_tokens == windows.num_bytes == len(triples) == size - 1
    assert len(windows) == -(-(size - 1) // length)
    assert all(len(batch.token_BL) <= batch_size and batch.token_BL.shape[1] <= length for batch in windows)


@by_name
@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=2, max_size=60), length=st.integers(1, 9))
def test_bytes_are_those_of_all_predicted_tokens(name, text, length):
    [(ids_L, length_L)] = ALL[name].encode_with_byte_lengths([text])
    if len(ids_L) < 2:
        return
    windows = text_windows([text], ALL[name], length)
    assert windows.num_bytes == sum(size for *_, size in collected(windows)) == length_L[1:].sum()
    assert windows.num_bytes == len(text.encode()) - length_L[0]


def test_a_sample_of_windows_is_spread_evenly():
    text = "".join(chr(97 + number % 26) for number in range(101))
    windows = text_windows([text], BYTES, 10, num_windows=5)
    starts = [row[0] - 97 for batch in windows for row in batch.token_BL.tolist()]
    assert starts == [0, 20, 40 - 26, 60 - 52, 80 - 78]
    assert len(windows) == 5
    assert windows.num_tokens == 50
    assert len(text_windows([text], BYTES, 10, num_windows=500)) == 10


def test_ranks_share_the_windows():
    text = "".join(chr(97 + number % 26) for number in range(96))
    ranks = [text_windows([text], BYTES, 10, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(triple for windows in ranks for triple in collected(windows)) == sorted(
        collected(text_windows([text], BYTES, 10))
    )
    assert [len(windows) for windows in ranks] == [4, 3, 3]


@pytest.mark.parametrize("texts", [[], [""], ["a"]])
def test_too_little_text(texts):
    with pytest.raises(DataError, match="fewer than two tokens"):
        text_windows(texts, BYTES, 4)
