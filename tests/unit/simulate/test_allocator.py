"""The allocator against cases worked by hand from c10/cuda/CUDACachingAllocator.cpp and torch's own tests."""

import pytest

from vramplan.simulate.allocator import CachingAllocator, OutOfMemory
from vramplan.spec.alloc_conf import AllocConf
from vramplan.units import KIB, MIB


def allocator(conf="", limit_bytes=None):
    return CachingAllocator(AllocConf.parse(conf), limit_bytes)


def power2_div(size, divisions):
    """As test_cuda.py's test_allocator_settings works it out: steps of the way between two powers of two."""
    power = 1
    while power < size:
        power *= 2
    if power == size:
        return power
    step, rounded = power // 2 // divisions, power // 2
    while rounded < size:
        rounded += step
    return rounded


class TestRounding:
    @pytest.mark.parametrize(
        ("asked", "given"), [(1, 512), (511, 512), (512, 512), (513, 1024), (311 * 411 * 4, 511488), (MIB, MIB)]
    )
    def test_to_512_bytes(self, asked, given):
        """round_size; 311 x 411 floats are the tensor of test_cuda.py's test_memory_snapshot."""
        assert allocator().round_size(asked) == given

    @pytest.mark.parametrize(("mib", "divisions"), [(84, 4), (84, 1), (400, 4), (3, 16), (100, 8)])
    def test_to_divisions_of_powers_of_two(self, mib, divisions):
        """test_cuda.py, test_allocator_settings: 21 Mi floats are 84 MiB, and 96 MiB with four divisions."""
        rounded = allocator(f"roundup_power2_divisions:{divisions}").round_size(mib * MIB)
        assert rounded == (power2_div(mib * MIB, divisions) if divisions > 1 else mib * MIB)

    def test_84_mib_in_four_divisions_are_96_mib(self):
        assert allocator("roundup_power2_divisions:4").round_size(84 * MIB) == 96 * MIB

    def test_list_of_divisions(self):
        """test_allocator_settings: 84 MiB fall under 64:8, 400 MiB under 256:2."""
        conf = "roundup_power2_divisions:[64:8,128:2,256:2,512:2,1024:1,>:1]"
        assert allocator(conf).round_size(84 * MIB) == power2_div(84 * MIB, 8) == 88 * MIB
        assert allocator(conf).round_size(400 * MIB) == power2_div(400 * MIB, 2) == 512 * MIB

    def test_small_requests_are_not_spread_over_divisions(self):
        """round_size: only sizes above 512 bytes times the divisions."""
        assert allocator("roundup_power2_divisions:4").round_size(2048) == 2048
        assert allocator("roundup_power2_divisions:4").round_size(2049) == 2560
        assert allocator("roundup_power2_divisions:16").round_size(5000) == 5120


class TestSegments:
    @pytest.mark.parametrize(
        ("asked", "reserved"),
        [
            (1, 2 * MIB),  # kSmallBuffer
            (MIB, 2 * MIB),  # kSmallSize is small still
            (MIB + 1, 20 * MIB),  # kLargeBuffer
            (10 * MIB - 512, 20 * MIB),
            (10 * MIB, 10 * MIB),  # kMinLargeAlloc: rounded to kRoundLarge
            (11 * MIB, 12 * MIB),
            (84 * MIB, 84 * MIB),
        ],
    )
    def test_size_of_a_new_segment(self, asked, reserved):
        """get_allocation_size."""
        found = allocator()
        found.malloc(asked)
        assert found.reserved_bytes == reserved

    def test_large_segment_size_is_a_setting(self):
        found = allocator("large_segment_size_mb:40,max_non_split_rounding_mb:40")
        found.malloc(5 * MIB)
        assert found.reserved_bytes == 40 * MIB

    def test_four_thousand_small_blocks_fill_a_segment(self):
        found = allocator()
        blocks = [found.malloc(512) for _ in range(4096)]
        assert found.reserved_bytes == 2 * MIB
        found.malloc(512)
        assert found.reserved_bytes == 4 * MIB
        for block in blocks:
            found.free(block)
        assert found.malloc(MIB).size == MIB
        assert found.reserved_bytes == 4 * MIB

    def test_small_and_large_requests_do_not_share(self):
        """get_pool: a free small segment does not serve a large request, nor the reverse."""
        found = allocator()
        found.free(found.malloc(MIB))
        large = found.malloc(MIB + 512)
        assert found.reserved_bytes == 22 * MIB
        found.free(large)
        found.malloc(MIB)
        found.malloc(MIB)
        assert found.reserved_bytes == 22 * MIB

    def test_streams_do_not_share(self):
        """BlockPool's order starts with the stream, and get_free_block stops at another stream's block."""
        found = allocator()
        found.free(found.malloc(30 * MIB, stream=1))
        found.malloc(30 * MIB, stream=2)
        assert found.reserved_bytes == 60 * MIB
        found.malloc(30 * MIB, stream=1)
        assert found.reserved_bytes == 60 * MIB


class TestSplitting:
    def test_a_large_rest_of_one_mib_is_not_split_off(self):
        """should_split: the rest of a large block must exceed kSmallSize."""
        found = allocator()
        found.free(found.malloc(12 * MIB))
        assert found.malloc(11 * MIB).size == 12 * MIB
        assert found.allocated_bytes == 12 * MIB

    def test_a_large_rest_above_one_mib_is(self):
        found = allocator()
        found.free(found.malloc(12 * MIB))
        assert found.malloc(11 * MIB - 512).size == 11 * MIB - 512

    def test_best_fit(self):
        """lower_bound over (stream, size, address): the smallest block that is large enough."""
        found = allocator()
        large, small, medium = found.malloc(40 * MIB), found.malloc(20 * MIB), found.malloc(30 * MIB)
        addresses = {block.size: block.address for block in (large, small, medium)}
        for block in (large, small, medium):
            found.free(block)
        assert found.malloc(22 * MIB).address == addresses[30 * MIB]
        assert found.malloc(22 * MIB).address == addresses[40 * MIB]
        assert found.reserved_bytes == 90 * MIB

    def test_neighbours_merge(self):
        """try_merge_blocks, both ways: a hole between two free blocks closes to a whole segment."""
        found = allocator()
        first, second, third = (found.malloc(6 * MIB) for _ in range(3))
        assert found.reserved_bytes == 20 * MIB
        found.free(first)
        found.free(third)
        found.malloc(7 * MIB)  # 6 free, then 6 + 2 free: the latter serves
        assert found.reserved_bytes == 20 * MIB
        found.free(second)
        assert found.malloc(12 * MIB).address == first.address
        assert found.reserved_bytes == 20 * MIB

    def test_fragmentation(self):
        """Every other block free: half of the bytes, but none of them together."""
        found = allocator()
        blocks = [found.malloc(2 * MIB) for _ in range(10)]
        assert found.reserved_bytes == 20 * MIB
        for block in blocks[::2]:
            found.free(block)
        found.malloc(4 * MIB)
        assert (found.allocated_bytes, found.reserved_bytes) == (14 * MIB, 40 * MIB)


class TestMaxSplit:
    def test_oversize_blocks_serve_only_requests_about_as_large(self):
        """get_free_block: none below the limit, and at most kLargeBuffer larger than asked."""
        found = allocator("max_split_size_mb:40")
        found.free(found.malloc(100 * MIB))
        found.malloc(30 * MIB)
        assert found.reserved_bytes == 130 * MIB
        found.malloc(80 * MIB)  # 20 MiB smaller: no
        assert found.reserved_bytes == 210 * MIB
        assert found.malloc(82 * MIB).size == 100 * MIB
        assert found.reserved_bytes == 210 * MIB

    def test_room_is_made_with_the_smallest_sufficient_block(self):
        """release_available_cached_blocks."""
        found = allocator("max_split_size_mb:40", 250 * MIB)
        for block in [found.malloc(size * MIB) for size in (100, 80, 60)]:
            found.free(block)
        found.malloc(44 * MIB - 512)  # 60 is 16 MiB too large at most: it fits
        assert (found.reserved_bytes, found.num_alloc_retries) == (240 * MIB, 0)
        found.malloc(50 * MIB)  # 80 is too large to give and enough to free
        assert (found.reserved_bytes, found.num_alloc_retries) == (210 * MIB, 0)

    def test_room_is_made_with_several_largest_first(self):
        found = allocator("max_split_size_mb:40", 200 * MIB)
        for block in [found.malloc(size * MIB) for size in (60, 50, 80)]:
            found.free(block)
        found.malloc(120 * MIB)
        assert (found.reserved_bytes, found.num_alloc_retries) == (170 * MIB, 0)

    def test_max_split_expandable(self):
        """test_cuda.py, test_max_split_expandable: 120 MiB allowed, expandable blocks in the free list."""
        found = allocator("expandable_segments:False,max_split_size_mb:40", 120 * MIB)
        expandable = AllocConf.parse("expandable_segments:True,max_split_size_mb:40")
        plain = found.conf
        first = found.malloc(40 * MIB)
        found.conf = expandable
        second = found.malloc(40 * MIB)
        found.conf = plain
        third = found.malloc(40 * MIB)
        with pytest.raises(OutOfMemory):
            found.malloc(40 * MIB)
        for block in (first, second, third):
            found.free(block)
        found.malloc(120 * MIB)
        assert found.reserved_bytes == 120 * MIB


class TestRoomUnderALimit:
    def test_the_cache_is_freed_before_giving_up(self):
        """malloc: alloc_block again after release_cached_blocks, counted as a retry."""
        found = allocator(limit_bytes=100 * MIB)
        found.free(found.malloc(60 * MIB))
        found.malloc(80 * MIB)
        assert (found.reserved_bytes, found.num_alloc_retries) == (80 * MIB, 1)

    def test_a_segment_in_use_is_not(self):
        """release_blocks frees only blocks without neighbours: one live MiB keeps its segment."""
        found = allocator(limit_bytes=100 * MIB)
        block = found.malloc(60 * MIB)
        found.free(block)
        found.malloc(2 * MIB)
        with pytest.raises(OutOfMemory):
            found.malloc(80 * MIB)
        assert (found.allocated_bytes, found.reserved_bytes, found.num_alloc_retries) == (2 * MIB, 60 * MIB, 1)

    def test_exactly_the_limit_fits(self):
        found = allocator(limit_bytes=64 * MIB)
        found.malloc(64 * MIB)
        with pytest.raises(OutOfMemory):
            found.malloc(1)

    def test_garbage_collection_frees_old_blocks_first(self):
        """garbage_collect_cached_blocks: those of at least average age, once past the threshold."""
        found = allocator("garbage_collection_threshold:0.5", 200 * MIB)
        old, held = found.malloc(40 * MIB), found.malloc(30 * MIB)
        found.free(old)
        for _ in range(5):
            found.free(found.malloc(60 * MIB))
        assert found.reserved_bytes == 130 * MIB
        found.malloc(62 * MIB)  # 130 > 100: the block of 40 is older than average and is freed, which is enough
        assert (found.reserved_bytes, found.num_alloc_retries) == (152 * MIB, 0)
        found.free(held)

    def test_empty_cache(self):
        found = allocator()
        kept, gone = found.malloc(30 * MIB), found.malloc(30 * MIB)
        found.free(gone)
        found.empty_cache()
        assert found.reserved_bytes == 30 * MIB
        found.free(kept)
        found.empty_cache()
        assert found.reserved_bytes == 0


class TestExpandableSegments:
    def test_pages_are_mapped_as_needed(self):
        """ExpandableSegment: 2 MiB pages for small blocks, 20 MiB for large ones, in one address range each."""
        found = allocator("expandable_segments:True")
        found.malloc(512)
        assert found.reserved_bytes == 2 * MIB
        first = found.malloc(30 * MIB)
        assert found.reserved_bytes == 42 * MIB
        second = found.malloc(30 * MIB)  # 10 free, and one page more
        assert found.reserved_bytes == 62 * MIB
        assert second.address == first.address + 30 * MIB

    def test_blocks_split_to_512_bytes(self):
        """should_split: expandable segments split large blocks as finely as small ones."""
        found = allocator("expandable_segments:True")
        assert found.malloc(20 * MIB - 512).size == 20 * MIB - 512
        assert found.malloc(MIB + 512).size == MIB + 512

    def test_what_grew_serves_a_larger_request(self):
        """The fragmentation that plain segments keep: freed 100 + 100 MiB serve 200."""
        plain, growing = allocator(), allocator("expandable_segments:True")
        for found in (plain, growing):
            blocks = [found.malloc(100 * MIB), found.malloc(100 * MIB)]
            for block in blocks:
                found.free(block)
            found.malloc(200 * MIB)
        assert (plain.reserved_bytes, growing.reserved_bytes) == (400 * MIB, 200 * MIB)

    def test_empty_cache_unmaps_whole_pages_only(self):
        """unmap_block: of 90 MiB free from 10 on, the pages from 20 to 100 go; 10 MiB before them stay."""
        found = allocator("expandable_segments:True")
        first, second = found.malloc(10 * MIB), found.malloc(90 * MIB)
        found.free(second)
        found.empty_cache()
        assert found.reserved_bytes == 20 * MIB
        assert found.malloc(5 * MIB).address == first.address + 10 * MIB
        assert found.reserved_bytes == 20 * MIB
        found.malloc(50 * MIB)  # 5 free and three pages more
        assert found.reserved_bytes == 80 * MIB

    def test_a_hole_that_was_unmapped_is_mapped_again(self):
        """find_expandable_block: the lowest address with room comes first."""
        found = allocator("expandable_segments:True")
        hole, above = found.malloc(40 * MIB), found.malloc(20 * MIB)
        found.free(hole)
        found.empty_cache()
        assert found.reserved_bytes == 20 * MIB
        assert found.malloc(40 * MIB).address == hole.address
        assert found.reserved_bytes == 60 * MIB
        assert above.address == hole.address + 40 * MIB

    def test_pages_of_another_size(self):
        found = allocator("expandable_segments:True,large_segment_size_mb:30")
        first, second = found.malloc(30 * MIB), found.malloc(60 * MIB)
        assert found.reserved_bytes == 90 * MIB
        found.free(second)
        found.empty_cache()
        assert found.reserved_bytes == 30 * MIB
        found.free(first)
        found.empty_cache()
        assert found.reserved_bytes == 0

    def test_the_limit_counts_pages(self):
        found = allocator("expandable_segments:True", 50 * MIB)
        found.malloc(30 * MIB)
        with pytest.raises(OutOfMemory):
            found.malloc(11 * MIB)
        assert found.malloc(10 * MIB).size == 10 * MIB


def test_test_memory_snapshot_fits_one_segment():
    """test_cuda.py, test_memory_snapshot: a thousand blocks of 512 bytes tile into the segment of the first tensor."""
    found = allocator()
    found.malloc(311 * 411 * 4)
    for _ in range(1000):
        found.malloc(128 * 4)
    assert found.reserved_bytes == 2 * MIB
    assert found.allocated_bytes == 511488 + 1000 * 512


def test_peaks_are_kept():
    found = allocator()
    found.free(found.malloc(100 * MIB))
    found.empty_cache()
    found.malloc(3 * KIB)
    assert (found.allocated_peak_bytes, found.reserved_peak_bytes) == (100 * MIB, 100 * MIB)
    assert (found.allocated_bytes, found.reserved_bytes) == (3 * KIB, 2 * MIB)
