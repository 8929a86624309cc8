import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError, InputError
from anabranch.serving.core.blocks import BlockPool
from anabranch.serving.core.kinds import GONE, Kind, match, most_blocks, most_new
from anabranch.serving.core.offload import LruTier
from anabranch.serving.core.scheduler import SchedulerConfig


def test_what_is_before_the_window_of_the_next_token_is_given_back():
    # Blocks of 4. The token at position 17 sees 12 to 17 through a window of 6: blocks 3 and 4.
    kind = Kind(BlockPool(8, 4), window=6)
    table = kind.pool.allocate(5)
    before = list(table)
    assert kind.first(17) == 3
    assert kind.trim(table, 17, num_prompt=17)
    assert table == [GONE, GONE, GONE, *before[3:]]
    assert kind.num_gone(table) == 3
    assert kind.pool.num_free == 6
    assert not kind.trim(table, 20, num_prompt=17)
    # At 21 it sees 16 to 21.
    assert kind.trim(table, 21, num_prompt=17)
    kind.free(table)
    assert kind.pool.num_free == 8
    kind.pool.check()


def test_without_a_window_nothing_is_given_back():
    kind = Kind(BlockPool(8, 4))
    table = kind.pool.allocate(5)
    assert not kind.trim(table, 20, num_prompt=20)
    assert (kind.first(20), kind.num_gone(table), kind.limit) == (0, 0, 32)
    assert kind.missing(table, 29) == 3


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 9))
def test_most_blocks_is_the_most_there_are_wherever_a_request_stands(window, num_new, size):
    kind = Kind(BlockPool(1, size), window)
    spans = [(start + num_new - 1) // size - kind.first(start) + 1 for start in range(3 * window + 3 * size)]
    assert max(spans) == most_blocks(window, num_new, size)


def test_what_lacks_is_a_window_and_not_the_whole_text():
    # A window of 6 and 8 new tokens: the 5 before and 8 lie in at most 4 blocks of 4.
    kind = Kind(BlockPool(10, 4), window=6, num_new=8)
    assert kind.missing([], 10) == 3
    assert kind.missing([], 1000) == 4
    assert kind.missing([GONE, GONE, 3, 4], 1000) == 2
    assert kind.missing([GONE, GONE, 3, 4], 17) == 1
    # Any text fits, since it is a window that has to; in three blocks a token of every place in a block has it.
    assert kind.limit is None
    assert Kind(BlockPool(3, 4), window=6).limit is None
    assert Kind(BlockPool(2, 4), window=6).limit == 8


def test_a_request_of_any_length_fits_where_a_window_does_however_many_tokens_a_step_may_take():
    """A window of 6 lies in at most 3 blocks of 4. With 8 new tokens of a step it takes 4, so in 3 steps are shorter, and none ends it."""
    assert [Kind(BlockPool(blocks, 4), window=6, num_new=8).limit for blocks in (2, 3, 4)] == [8, None, None]
    kind = Kind(BlockPool(3, 4), window=6, num_new=8)
    table: list[int] = []
    for computed in range(100):
        kind.trim(table, computed, num_prompt=1)
        assert kind.can_hold(table) > computed
        kind.pool.append(table, computed + 1)
    assert kind.missing(table, 1000) <= kind.pool.num_blocks


def test_new_tokens_are_a_part_of_a_prompt_or_a_token_with_its_guesses_of_one_step_or_two():
    assert most_new(512, None, 0, is_async=False) == 512
    assert most_new(512, 64, 0, is_async=False) == 64
    assert most_new(512, 64, 0, is_async=True) == 128
    assert most_new(512, 4, 7, is_async=False) == 8
    assert most_new(6, 4, 7, is_async=False) == 6


def naive_match(kinds, keys):
    """Of all lengths the longest one of which all blocks that position ``length`` sees are there, and the first kind's last one."""
    size = kinds[0].pool.block_tokens
    for length in range(len(keys), -1, -1):
        tables = []
        for kind in kinds:
            lowest = 0 if kind.window is None else length * size - kind.window + 1
            tables.append(
                [
                    kind.pool.find(key) if (place + 1) * size > lowest else GONE
                    for place, key in enumerate(keys[:length])
                ]
            )
        if length and kinds[0].pool.find(keys[length - 1]) is None:
            continue
        if not any(block is None for table in tables for block in table):
            return tables
    raise AssertionError("nothing at all is always there")


@settings(max_examples=200)
@given(st.data(), st.integers(1, 5), st.integers(0, 12))
def test_a_prefix_is_found_where_every_kind_has_what_the_next_token_sees(data, size, length):
    windows = data.draw(st.sampled_from([(None,), (7,), (1,), (None, 1), (None, 6), (9, 4)]))
    keys = [b"%d" % number for number in range(length)]
    kinds = []
    for window in windows:
        pool = BlockPool(12, size)
        for key in keys:
            if data.draw(st.integers(0, 4)):
                (block,) = pool.allocate(1)
                pool.publish(block, key)
        kinds.append(Kind(pool, window))
    assert match(kinds, keys) == naive_match(kinds, keys)


def test_where_nobody_has_been_nothing_is_found():
    """Though behind a window of one position no token needs anything."""
    kind = Kind(BlockPool(4, 2), window=1)
    assert match([kind], [b"a", b"b"]) == [[]]
    (block,) = kind.pool.allocate(1)
    kind.pool.publish(block, b"a")
    assert match([kind], [b"a", b"b"]) == [[GONE]]


def test_the_middle_of_an_answer_is_taken_before_what_others_may_begin_with():
    pool = BlockPool(6, 4)
    kind = Kind(pool, window=4)
    table = pool.allocate(6)
    for number, block in enumerate(table):
        pool.publish(block, b"%d" % number)
    before = list(table)
    # Positions 0 to 9 are the prompt, so blocks 0 to 2; the next token sees 20 to 23.
    kind.trim(table, 23, num_prompt=10)
    assert pool.allocate(5) == [before[3], before[4], before[2], before[1], before[0]]


def test_windows_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="local_window is 8 and local_blocks None"):
        SchedulerConfig(num_blocks=4, max_positions=8, local_window=8)
    with pytest.raises(InputError, match="a tier keeps whole sequences"):
        SchedulerConfig(num_blocks=4, max_positions=8, window=8).build(tier=LruTier(2))
