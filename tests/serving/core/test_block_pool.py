import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from anabranch.errors import ConfigError, InputError
from anabranch.serving.core.blocks import BlockPool
from anabranch.serving.core.kinds import Kind
from anabranch.serving.core.prefix import PrefixCache, child_key, root_key


class PoolMachine(RuleBasedStateMachine):
    """Any order of operations, beside books kept in the plainest way: a list of holders' tables, and what each key should find."""

    tables = Bundle("tables")

    @initialize(num_blocks=st.integers(1, 12), block_tokens=st.integers(1, 4))
    def start(self, num_blocks, block_tokens):
        self.evicted = []
        self.pool = BlockPool(num_blocks, block_tokens, lambda key, block: self.evicted.append((key, block)))
        self.live = []
        self.published = {}
        self.serial = 0

    def counted(self, block):
        return sum(table.count(block) for table in self.live)

    def settle(self, taken):
        """What was just taken is found by no key any more."""
        for key, block in self.evicted:
            assert block in taken
            assert self.published.pop(key) == block
        self.evicted.clear()

    @rule(target=tables, count=st.integers(0, 6))
    def allocate(self, count):
        free = self.pool.num_free
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is None:
            return multiple()
        assert len(blocks) == len(set(blocks)) == count
        assert not any(self.counted(block) for block in blocks), "a block in use was given out"
        self.settle(blocks)
        self.live.append(blocks)
        return blocks

    @rule(table=tables, num_tokens=st.integers(0, 30))
    def append(self, table, num_tokens):
        before, free = list(table), self.pool.num_free
        missing = max(0, self.pool.blocks_for(num_tokens) - len(table))
        assert self.pool.append(table, num_tokens) == (missing <= free)
        assert table[: len(before)] == before
        assert len(table) == len(before) + (missing if missing <= free else 0)
        self.settle(table[len(before) :])

    @rule(target=tables, table=tables, data=st.data())
    def fork(self, table, data):
        num_tokens = data.draw(st.integers(0, len(table) * self.pool.block_tokens))
        free = self.pool.num_free
        forked = self.pool.fork(table, num_tokens)
        if forked is None:
            assert free == 0
            return multiple()
        blocks, copies = forked
        full = num_tokens // self.pool.block_tokens
        assert blocks[:full] == table[:full]
        assert len(blocks) == self.pool.blocks_for(num_tokens)
        assert copies == (() if len(blocks) == full else ((table[full], blocks[full]),))
        assert not any(self.counted(block) for block in blocks[full:])
        self.settle(blocks[full:])
        self.live.append(blocks)
        return blocks

    @rule(table=tables, data=st.data())
    def publish(self, table, data):
        fresh = [block for block in table if block not in self.published.values()]
        if not fresh:
            return
        block = data.draw(st.sampled_from(fresh))
        key = data.draw(st.sampled_from([*self.published, b"new%d" % self.serial]))
        self.serial += 1
        assert self.pool.publish(block, key) == (key not in self.published)
        self.published.setdefault(key, block)

    @rule(target=tables, data=st.data())
    def revive(self, data):
        if not self.published:
            return multiple()
        key = data.draw(st.sampled_from(sorted(self.published)))
        table = [self.pool.find(key)]
        self.pool.hold(table)
        self.live.append(table)
        return table

    @rule(table=consumes(tables))
    def free(self, table):
        self.pool.free(table)
        self.live = [other for other in self.live if other is not table]

    @rule()
    def forget_all(self):
        assert self.pool.forget_all() == len(self.published)
        self.published.clear()

    @invariant()
    def books_balance(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        held = {block for table in self.live for block in table}
        assert self.pool.num_free == self.pool.num_blocks - len(held)
        assert all(self.pool.holders(block) == self.counted(block) for block in range(self.pool.num_blocks))
        assert {key: self.pool.find(key) for key in self.published} == self.published
        assert self.pool.num_cached == len(self.published)

    def teardown(self):
        for table in getattr(self, "live", []):
            self.pool.free(table)
        if hasattr(self, "pool"):
            assert self.pool.num_free == self.pool.num_blocks, "blocks leak"
            self.pool.check()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def published_chain(pool, length):
    cache, keys = PrefixCache([Kind(pool)]), []
    cache.extend(keys, cache.root("", ()), list(range(length * pool.block_tokens)), length * pool.block_tokens)
    blocks = pool.allocate(length)
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    return cache, keys, blocks


def test_the_tail_of_a_chain_is_evicted_first():
    pool = BlockPool(4, 2)
    cache, keys, blocks = published_chain(pool, 4)
    pool.free(blocks)
    for kept in (3, 2, 1, 0):
        assert pool.allocate(1) == [blocks[kept]]
        assert cache.match(keys) == [blocks[:kept]]


def test_the_least_recently_used_chain_is_evicted_first_and_blocks_without_a_key_before_all():
    pool = BlockPool(5, 1)
    first, second, plain = pool.allocate(2), pool.allocate(2), pool.allocate(1)
    for number, block in enumerate([*first, *second]):
        pool.publish(block, b"%d" % number)
    for blocks in (second, first, plain):
        pool.free(blocks)
    pool.hold(second)  # used again: now the more recent one
    pool.free(second)
    assert pool.allocate(5) == [*plain, *first[::-1], *second[::-1]]
    assert pool.evictions == 4


def test_a_head_in_use_outlives_its_free_tail():
    pool = BlockPool(3, 2)
    cache, keys, blocks = published_chain(pool, 3)
    pool.hold(blocks[:1])
    pool.free(blocks)
    assert pool.allocate(3) is None
    pool.allocate(2)
    assert cache.match(keys) == [blocks[:1]]


def test_wrong_use_is_refused():
    with pytest.raises(ConfigError, match="num_blocks is 0"):
        BlockPool(0)
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    with pytest.raises(InputError, match="published"):
        pool.publish(block, b"b")
    pool.free([block])
    with pytest.raises(InputError, match="nobody holds it"):
        pool.free([block])
    with pytest.raises(InputError, match="is free"):
        pool.publish(block, b"c")


def test_keys_depend_on_all_that_comes_before_and_nothing_else():
    keys = {
        root_key(""),
        root_key("a"),
        root_key("", [("a", "b")]),
        root_key("", [("ab", "")]),
        root_key("a", [("b", "")]),
        root_key("", [("a", ""), ("b", "")]),
        root_key("", generation=1),
        root_key("1"),
        root_key("", num_streams=2),
        root_key("", [("num_streams", "2")]),
        root_key("", path=()),
        root_key("", path=(2,)),
        root_key("", path=(1, 0, 1)),
        root_key("", path=(10, 1)),
        root_key("", [("path", "1,0,1")]),
        child_key(root_key(""), [1, 2]),
        child_key(root_key(""), [2, 1]),
        child_key(root_key(""), [1, 2, 0]),
        child_key(root_key("a"), [1, 2]),
        child_key(child_key(root_key(""), [1]), [2]),
        child_key(root_key(""), [258]),
        child_key(root_key(""), [1 << 40]),
    }
    assert len(keys) == 22
    assert root_key("", [("a", "1"), ("b", "2")]) == root_key("", [("b", "2"), ("a", "1")])
    assert root_key("\ud800") != root_key("\ud801")


def test_each_block_is_hashed_once_and_a_reset_changes_the_root():
    pool = BlockPool(4, 2)
    cache, keys, blocks = published_chain(pool, 3)
    before, root = list(keys), cache.root("", ())
    cache.extend(keys, b"another root, not looked at", [0, 1, 2, 3, 4, 5, 6], 7)
    assert keys == before
    cache.extend(keys, root, [0, 1, 2, 3, 4, 5, 6, 7], 8)
    assert keys == [*before, child_key(before[-1], [6, 7])]
    assert cache.reset() == 3
    assert cache.match(keys) == [[]]
    assert cache.root("", ()) != root
    pool.free(blocks)
    pool.check()
