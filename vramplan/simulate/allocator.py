"""CachingAllocator: torch's CUDA caching allocator, without a GPU.

Follows c10/cuda/CUDACachingAllocator.cpp function by function; names are its names. Addresses are numbers: new
segments get higher ones, as they mostly do from ``cudaMalloc``. Not modelled: graph captures and private pools, and
blocks whose free waits for another stream (``record_stream``), which are freed at once.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable

from vramplan.simulate.block import Block, Pool, expandable_size, room_from
from vramplan.spec.alloc_conf import UNLIMITED, AllocConf
from vramplan.units import MIB

MIN_BLOCK = 512
"""kMinBlockSize: all sizes are rounded up to multiples of it."""
SMALL_SIZE = 1 * MIB
"""kSmallSize: the largest request served from the small pool."""
SMALL_BUFFER = 2 * MIB
"""kSmallBuffer: a small pool's segment."""
MIN_LARGE_ALLOC = 10 * MIB
"""kMinLargeAlloc: from here on a segment is as large as its first request, rounded up."""
ROUND_LARGE = 2 * MIB
"""kRoundLarge: to multiples of it."""
ADDRESS_SPACE = 2**45
"""Bytes between the starts of expandable segments, more than any has; the others lie below the first."""


SegmentWatcher = Callable[[str, int, int, int], None]
"""Told of ``segment_alloc``, ``segment_free``, ``segment_map`` and ``segment_unmap``: address, bytes, stream."""


class OutOfMemory(Exception):
    """A request that no cached block serves and no new segment fits for."""


class CachingAllocator:
    """``malloc``, ``free``, ``empty_cache`` and what they make of the counters.

    ``limit_bytes``: what segments may take altogether; None: no limit.
    """

    def __init__(
        self,
        conf: AllocConf | None = None,
        limit_bytes: int | None = None,
        on_segment: SegmentWatcher | None = None,
    ) -> None:
        self._on_segment = on_segment
        self.conf = conf or AllocConf()
        self.limit_bytes = UNLIMITED if limit_bytes is None else limit_bytes
        self.reserved_bytes = 0
        self.reserved_peak_bytes = 0
        self.allocated_bytes = 0
        self.allocated_peak_bytes = 0
        self.num_alloc_retries = 0
        self.segments: dict[int, Block] = {}
        """The first block of each segment, by address."""
        self._small = Pool(is_small=True)
        self._large = Pool(is_small=False)
        self._next_address = SMALL_BUFFER
        self._next_range = ADDRESS_SPACE

    def malloc(self, num_bytes: int, stream: int = 0) -> Block:
        """A block of at least ``num_bytes``.

        Raises:
            OutOfMemory: also after cached segments were freed.
        """
        size = self.round_size(num_bytes)
        pool = self._small if size <= SMALL_SIZE else self._large
        pool.num_searches += 1
        block = self._get_free_block(pool, size, stream)
        if block is None:
            if self.conf.garbage_collection_threshold > 0 and self.limit_bytes != UNLIMITED:
                self._garbage_collect()
            block = self._alloc_block(pool, size, stream)
        if block is None and self._release_available_cached_blocks(pool, size, stream):
            block = self._alloc_block(pool, size, stream)
        if block is None:
            self.empty_cache()
            self.num_alloc_retries += 1
            block = self._alloc_block(pool, size, stream)
        if block is None:
            raise OutOfMemory(num_bytes)
        return self._alloc_found_block(block, size)

    def free(self, block: Block) -> None:
        """Gives a block back; it joins with free neighbours."""
        block.allocated = False
        self.allocated_bytes -= block.size
        self._free_block(block)

    def empty_cache(self) -> None:
        """Frees every segment that is wholly cached, and unmaps cached pages of expandable ones (release_blocks)."""
        for pool in (self._large, self._small):
            for block in list(pool.at.values()):
                if block.is_expandable:
                    self._unmap_block(block)
                elif not block.is_split:
                    self._release_block(block)

    def round_size(self, size: int) -> int:
        """Bytes that a request occupies."""
        if size < MIN_BLOCK:
            return MIN_BLOCK
        divisions = self.conf.divisions_for(size)
        if divisions > 1 and size > MIN_BLOCK * divisions:
            return _next_division(size, divisions)
        return -(-size // MIN_BLOCK) * MIN_BLOCK

    def _get_free_block(self, pool: Pool, size: int, stream: int) -> Block | None:
        index = pool.first_of_size(stream, size)
        if index == len(pool.keys) or pool.keys[index][0] != stream:
            return None
        block = pool.block(index)
        while block.is_expandable and index + 1 < len(pool.keys) and pool.keys[index + 1][0] == stream:
            following = pool.block(index + 1)
            if expandable_size(following) >= expandable_size(block):
                break
            index, block = index + 1, following
        limit = self.conf.max_split_bytes
        if size < limit <= block.size or (
            size >= limit and block.size >= size + self.conf.max_non_split_rounding_bytes
        ):
            return None
        pool.erase(block)
        return block

    def _alloc_block(self, pool: Pool, size: int, stream: int) -> Block | None:
        """A new segment, or more of an expandable one; None where the limit does not allow it."""
        segment_bytes = self._allocation_size(size)
        if self.conf.expandable_segments:
            return self._try_allocate_expandable_block(pool, size, stream)
        if self.reserved_bytes + segment_bytes > self.limit_bytes:
            return None
        self._reserve(segment_bytes)
        block = Block(stream, segment_bytes, pool, self._next_address)
        self._next_address += segment_bytes
        self.segments[block.address] = block
        self._tell("segment_alloc", block)
        return block

    def _alloc_found_block(self, block: Block, size: int) -> Block:
        if self._should_split(block, size):
            rest = Block(block.stream, block.size - size, block.pool, block.address + size, block.is_expandable)
            rest.prev, rest.next, block.next = block, block.next, rest
            if rest.next is not None:
                rest.next.prev = rest
            block.size = size
            block.pool.insert(rest)
        block.allocated = True
        self.allocated_bytes += block.size
        self.allocated_peak_bytes = max(self.allocated_peak_bytes, self.allocated_bytes)
        return block

    def _should_split(self, block: Block, size: int) -> bool:
        rest = block.size - size
        if block.pool.is_small or self.conf.expandable_segments:
            return rest >= MIN_BLOCK
        return size < self.conf.max_split_bytes and rest > SMALL_SIZE

    def _free_block(self, block: Block) -> None:
        for neighbour in (block.prev, block.next):
            self._try_merge(block, neighbour)
        block.pool.insert(block)

    def _try_merge(self, block: Block, other: Block | None) -> None:
        """Joins a free neighbour of the same kind into ``block``."""
        if other is None or other.allocated or other.mapped != block.mapped:
            return
        if other.mapped:
            block.pool.erase(other)
        else:
            block.pool.unmapped.remove((other.stream, other.address, other))
        if other is block.prev:
            if self.segments.get(other.address) is other:
                self.segments[other.address] = block
            block.address, block.prev = other.address, other.prev
            if block.prev is not None:
                block.prev.next = block
        else:
            block.next = other.next
            if block.next is not None:
                block.next.prev = block
        block.size += other.size

    def _release_available_cached_blocks(self, pool: Pool, size: int, stream: int) -> bool:
        """With ``max_split_size_mb``: frees oversize cached blocks, smallest that suffices first, else largest ones."""
        limit = self.conf.max_split_bytes
        if limit == UNLIMITED:
            return False
        needed = max(size, limit)
        index = pool.first_of_size(stream, needed)
        if index < len(pool.keys) and pool.keys[index][0] == stream and not pool.block(index).is_expandable:
            self._release_block(pool.block(index))
            return True
        released = 0
        while released < needed and index > 0:
            index -= 1
            block = pool.block(index)
            if block.size < limit or block.stream != stream:
                break
            if not block.is_expandable:
                released += block.size
                self._release_block(block)
        return released >= needed

    def _release_block(self, block: Block) -> None:
        block.pool.erase(block)
        del self.segments[block.address]
        self.reserved_bytes -= block.size
        self._tell("segment_free", block)

    def _garbage_collect(self) -> None:
        """Frees wholly cached large segments, those of at least average age first, until below the threshold."""
        excess = self.reserved_bytes - int(self.conf.garbage_collection_threshold * self.limit_bytes)
        freeable = [block for block in self._large.at.values() if not block.is_split]
        while excess > 0 and freeable:
            ages = {block.address: self._large.num_searches - block.cached_since for block in freeable}
            mean_age = sum(ages.values()) / len(ages)
            old = [block for block in freeable if ages[block.address] >= mean_age]
            for block in old:
                excess -= block.size
                self._release_block(block)
            freeable = [block for block in freeable if block not in old]

    def _try_allocate_expandable_block(self, pool: Pool, size: int, stream: int) -> Block | None:
        block = self._find_expandable_block(pool, size, stream)
        if not block.mapped and not self._map_block(block, min(block.size, size)):
            return None
        while block.size < size:
            following = block.next
            assert following is not None
            if not self._map_block(following, min(size - block.size, following.size)):
                return None
            block = following
        pool.erase(block)
        return block

    def _find_expandable_block(self, pool: Pool, size: int, stream: int) -> Block:
        """The first of the free and unmapped blocks in a row that have room; a new segment where none has."""
        for owner, _, block in pool.unmapped:
            before = block.prev
            first = before if before is not None and not before.allocated else block
            if owner == stream and room_from(first, size):
                return first
        block = Block(stream, ADDRESS_SPACE // 2, pool, self._next_range, is_expandable=True, mapped=False)
        self._next_range += ADDRESS_SPACE
        self.segments[block.address] = block
        insort(pool.unmapped, (stream, block.address, block), key=lambda item: item[:2])
        return block

    def _map_block(self, block: Block, size: int) -> bool:
        """Maps pages from the block's start on, as many as ``size`` needs, and joins them with free neighbours."""
        pages = self._page_bytes(block.pool)
        mapped = -(-size // pages) * pages
        if self.reserved_bytes + mapped > self.limit_bytes:
            return False
        block.pool.unmapped.remove((block.stream, block.address, block))
        if mapped < block.size:
            rest = Block(block.stream, block.size - mapped, block.pool, block.address + mapped, True, mapped=False)
            rest.prev, rest.next, block.next = block, block.next, rest
            if rest.next is not None:
                rest.next.prev = rest
            block.size = mapped
            insort(block.pool.unmapped, (rest.stream, rest.address, rest), key=lambda item: item[:2])
        block.mapped = True
        self._reserve(mapped)
        self._tell("segment_map", block)
        for neighbour in (block.prev, block.next):
            self._try_merge(block, neighbour)
        block.pool.insert(block)
        return True

    def _unmap_block(self, block: Block) -> None:
        """Unmaps the whole pages inside a free block; what is left of it at both ends stays cached."""
        pages = self._page_bytes(block.pool)
        base = block.address - block.address % ADDRESS_SPACE
        start = base - (base - block.address) // pages * pages
        end = base + (block.address + block.size - base) // pages * pages
        if end <= start:
            return
        block.pool.erase(block)
        if start > block.address:
            head = Block(block.stream, start - block.address, block.pool, block.address, True)
            head.prev, head.next = block.prev, block
            if head.prev is not None:
                head.prev.next = head
            if self.segments.get(block.address) is block:
                self.segments[block.address] = head
            block.prev = head
            block.pool.insert(head)
        if end < block.address + block.size:
            tail = Block(block.stream, block.address + block.size - end, block.pool, end, True)
            tail.prev, tail.next = block, block.next
            if tail.next is not None:
                tail.next.prev = tail
            block.next = tail
            block.pool.insert(tail)
        block.address, block.size, block.mapped = start, end - start, False
        self.reserved_bytes -= block.size
        self._tell("segment_unmap", block)
        for neighbour in (block.prev, block.next):
            self._try_merge(block, neighbour)
        insort(block.pool.unmapped, (block.stream, block.address, block), key=lambda item: item[:2])

    def _tell(self, action: str, block: Block) -> None:
        if self._on_segment is not None:
            self._on_segment(action, block.address, block.size, block.stream)

    def _reserve(self, num_bytes: int) -> None:
        self.reserved_bytes += num_bytes
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, self.reserved_bytes)

    def _allocation_size(self, size: int) -> int:
        """get_allocation_size: bytes of the segment that is asked for to serve a block."""
        if size <= SMALL_SIZE:
            return SMALL_BUFFER
        if size < MIN_LARGE_ALLOC:
            return self.conf.large_segment_bytes
        return -(-size // ROUND_LARGE) * ROUND_LARGE

    def _page_bytes(self, pool: Pool) -> int:
        """What an expandable segment of the pool maps at a time."""
        return SMALL_BUFFER if pool.is_small else self.conf.large_segment_bytes


def _next_division(size: int, divisions: int) -> int:
    """roundup_power2_next_division: the next of ``divisions`` equal steps between two powers of two."""
    if size <= 4 or divisions <= 1:
        return size
    floor = 1 << (size.bit_length() - 1)
    if floor == size:
        return size
    step = floor // divisions
    return size if step == 0 else -(-size // step) * step
