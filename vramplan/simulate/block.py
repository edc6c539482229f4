"""Blocks of the caching allocator's segments, and the pools of those that are free."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment. ``prev`` and ``next`` are its neighbours in the segment."""

    stream: int
    size: int
    pool: Pool
    address: int
    is_expandable: bool = False
    allocated: bool = False
    mapped: bool = True
    prev: Block | None = None
    next: Block | None = None
    cached_since: int = 0
    """The pool's count of searches when the block last became free (``gc_count_base``)."""

    @property
    def is_split(self) -> bool:
        return self.prev is not None or self.next is not None


@dataclass(slots=True)
class Pool:
    """Free blocks, in order of stream, size and address."""

    is_small: bool
    keys: list[tuple[int, int, int]] = field(default_factory=list)
    at: dict[int, Block] = field(default_factory=dict)
    unmapped: list[tuple[int, int, Block]] = field(default_factory=list)
    """(stream, address, block) of address space that expandable segments have not mapped."""
    num_searches: int = 0
    """``get_free_blocks_call_count``"""

    def insert(self, block: Block) -> None:
        block.cached_since = self.num_searches
        insort(self.keys, (block.stream, block.size, block.address))
        self.at[block.address] = block

    def erase(self, block: Block) -> None:
        del self.keys[bisect_left(self.keys, (block.stream, block.size, block.address))]
        del self.at[block.address]

    def first_of_size(self, stream: int, size: int) -> int:
        """Index of the first free block of the stream that is at least this large."""
        return bisect_left(self.keys, (stream, size, 0))

    def block(self, index: int) -> Block:
        return self.at[self.keys[index][2]]


def expandable_size(block: Block) -> int:
    """The size that a free block can grow to in place."""
    following = block.next
    return block.size + (following.size if following is not None and not following.mapped else 0)


def room_from(block: Block | None, size: int) -> bool:
    """Whether the free and unmapped blocks in a row from this one on have so many bytes."""
    room = 0
    while room < size and block is not None and not block.allocated:
        room += block.size
        block = block.next
    return room >= size
