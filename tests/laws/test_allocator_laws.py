"""Laws of the caching allocator over any sequence of requests, frees and emptied caches, under any setting."""

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.simulate.allocator import MIN_BLOCK, SMALL_SIZE, Block, CachingAllocator, OutOfMemory
from vramplan.spec.alloc_conf import AllocConf
from vramplan.units import KIB, MIB

CONFS = st.sampled_from(
    [
        "",
        "expandable_segments:True",
        "max_split_size_mb:32",
        "roundup_power2_divisions:4",
        "roundup_power2_divisions:[1:8,16:2,>:0]",
        "expandable_segments:True,max_split_size_mb:32,roundup_power2_divisions:8",
        "garbage_collection_threshold:0.5",
        "large_segment_size_mb:24,max_non_split_rounding_mb:24",
    ]
)
SIZES = st.one_of(st.integers(1, 4 * KIB), st.integers(1, 3 * MIB), st.integers(MIB, 90 * MIB))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("malloc"), SIZES, st.integers(0, 1)),
        st.tuples(st.just("free"), st.integers(0, 1000), st.just(0)),
        st.tuples(st.just("empty"), st.just(0), st.just(0)),
    ),
    max_size=60,
)
LIMITS = st.one_of(st.none(), st.integers(20 * MIB, 400 * MIB))


@dataclass
class Played:
    allocator: CachingAllocator
    live: list[tuple[Block, int]]
    failed: int = 0


def play(conf, steps, limit, check=lambda played: None):
    played = Played(CachingAllocator(AllocConf.parse(conf), limit), [])
    for what, number, stream in steps:
        if what == "malloc":
            try:
                played.live.append((played.allocator.malloc(number, stream), number))
            except OutOfMemory:
                played.failed += 1
        elif what == "free" and played.live:
            played.allocator.free(played.live.pop(number % len(played.live))[0])
        elif what == "empty":
            played.allocator.empty_cache()
        check(played)
    return played


def blocks_of(allocator):
    for first in allocator.segments.values():
        assert first.prev is None
        block = first
        while block is not None:
            yield block
            assert block.next is None or (block.next.prev is block and block.next.address == block.address + block.size)
            block = block.next


def check_books(played):
    """Every byte of every segment is in one block; what is live, free and unmapped is what the counters say."""
    allocator = played.allocator
    blocks = list(blocks_of(allocator))
    mapped = [block for block in blocks if block.mapped]
    assert sum(block.size for block in mapped) == allocator.reserved_bytes
    assert sum(block.size for block in mapped if block.allocated) == allocator.allocated_bytes
    assert {id(block) for block in blocks if block.allocated} == {id(block) for block, _ in played.live}
    free = [block for block in mapped if not block.allocated]
    pooled = [block for pool in (allocator._small, allocator._large) for block in pool.at.values()]
    assert {id(block) for block in free} == {id(block) for block in pooled}
    for pool in (allocator._small, allocator._large):
        assert pool.keys == sorted((block.stream, block.size, block.address) for block in pool.at.values())
    for block in free:  # free neighbours of one kind are one block
        assert block.next is None or block.next.allocated or not block.next.mapped


@settings(max_examples=150, deadline=None)
@given(CONFS, STEPS, LIMITS)
def test_books_balance_after_every_step(conf, steps, limit):
    play(conf, steps, limit, check_books)


@settings(max_examples=150, deadline=None)
@given(CONFS, STEPS, LIMITS)
def test_reserved_is_at_least_allocated_and_at_most_the_limit(conf, steps, limit):
    def check(played):
        found = played.allocator
        assert 0 <= found.allocated_bytes <= found.reserved_bytes <= found.reserved_peak_bytes
        assert limit is None or found.reserved_peak_bytes <= limit
        assert sum(asked for _, asked in played.live) <= found.allocated_bytes

    play(conf, steps, limit, check)


@settings(max_examples=150, deadline=None)
@given(CONFS, STEPS, LIMITS)
def test_blocks_are_whole_units_large_enough_and_apart(conf, steps, limit):
    played = play(conf, steps, limit)
    found = played.allocator
    for block, asked in played.live:
        size = found.round_size(asked)
        assert asked <= size <= block.size
        assert block.size % MIN_BLOCK == block.address % MIN_BLOCK == 0
        assert block.pool.is_small == (size <= SMALL_SIZE)
        # at most what was not worth splitting off
        assert block.size - size <= max(SMALL_SIZE, found.conf.max_non_split_rounding_bytes)
    spans = sorted((block.address, block.address + block.size) for block, _ in played.live)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@settings(max_examples=150, deadline=None)
@given(CONFS, STEPS, LIMITS)
def test_frees_give_everything_back(conf, steps, limit):
    played = play(conf, steps, limit)
    reserved = played.allocator.reserved_bytes
    for block, _ in played.live:
        played.allocator.free(block)
    assert (played.allocator.allocated_bytes, played.allocator.reserved_bytes) == (0, reserved)
    played.allocator.empty_cache()
    assert played.allocator.reserved_bytes == 0


@settings(max_examples=100, deadline=None)
@given(CONFS.filter(lambda conf: "garbage" not in conf), STEPS)
def test_a_limit_that_was_never_reached_changes_nothing(conf, steps):
    free = play(conf, steps, None).allocator
    held = play(conf, steps, free.reserved_peak_bytes)
    assert held.failed == held.allocator.num_alloc_retries == 0
    assert held.allocator.reserved_bytes == free.reserved_bytes


@settings(max_examples=100, deadline=None)
@given(CONFS.filter(lambda conf: "expandable" in conf), STEPS)
def test_a_repeated_step_reserves_no_more(conf, steps):
    """As training does: the second time round, requests find what growing segments have mapped."""
    requests = [step for step in steps if step[0] == "malloc"]
    allocator = CachingAllocator(AllocConf.parse(conf))
    peaks = []
    for _ in range(2):
        blocks = [allocator.malloc(size, stream) for _, size, stream in requests]
        for block in reversed(blocks):
            allocator.free(block)
        peaks.append(allocator.reserved_peak_bytes)
    assert peaks[0] == peaks[1]
