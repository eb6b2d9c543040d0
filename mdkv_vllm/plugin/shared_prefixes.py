"""Compressed segments that other requests may read: a tree of leases in vLLM's prefix cache.

A lease depends on the tokens up to the end of its segment's window, and on the segments before it,
whose leases those tokens attended to. So it is known by both: by the path of segments that it
continues, and by vLLM's hash of the block in which the window ends, which stands for all tokens
(and for salt, adapter and images) up to there.

    root --[0, 512)--> o --[512, 1024)--> o        a document that many requests begin with
         `-[0, 1500)-> o --[1500, 2100)-> o        two turns of a chat

Each block of a written lease is cached by vLLM under a hash of its own, which no other lease ever
has, not even one of the same tokens: blocks of two must not be mixed. vLLM evicts blocks one by one
and tells nobody, so a lease that is found in the tree is looked up block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from uuid import uuid4

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from mdkv_vllm.core.segment import Segment, SharedSegment
from mdkv_vllm.plugin.compat import cache_block


@dataclass(eq=False)
class Prefix:
    """A path of segments from a request's first token on.

    Attributes:
        segment: the last of them; None for the root.
        key_block: block in which the last one's window ends.
        lease_hashes: what the blocks of its lease are cached under.
        seen_cached: whether its lease was in the cache when somebody last looked.
        forgotten: whether nobody finds it any more.
        following: by the hash of the block in which their window ends, paths that go on from here.
    """

    segment: SharedSegment | None = None
    key_block: int = 0
    lease_hashes: list[BlockHash] = field(default_factory=list)
    seen_cached: bool = False
    forgotten: bool = False
    following: dict[BlockHash, Prefix] = field(default_factory=dict)

    @property
    def end_block(self) -> int:
        """Where its segments end."""
        return self.segment.end_block if self.segment else 0


class SharedPrefixes:
    """Publishes leases and finds them.

    Args:
        block_pool: vLLM's.
        group_id: of our layers.
        block_size: tokens in one block.

    Attributes:
        published: leases that were new.
        evicted: of these, those that were found to be gone.
    """

    def __init__(self, block_pool: BlockPool, group_id: int, block_size: int) -> None:
        self.published = self.evicted = 0
        self._root = Prefix()
        self._pool = block_pool
        self._group_id = group_id
        self._block_size = block_size
        self._paths = 0
        self._name = uuid4()

    def key_block(self, segment: Segment) -> int:
        """Block in which its window ends: it is known by the tokens up to this one's end."""
        return -(-segment.ripe_at // self._block_size) - 1

    def publish(
        self,
        path: Prefix,
        segment: Segment,
        block_hashes: Sequence[BlockHash],
        blocks: Sequence[KVCacheBlock],
    ) -> Prefix:
        """Let others read a lease that has been written and will not be again.

        Args:
            path: the segments before it.
            segment: what it holds.
            block_hashes: vLLM's of the request, that of its key block among them.
            blocks: the request's.

        Returns:
            The path with this segment.
        """
        key_block = self.key_block(segment)
        key = block_hashes[key_block]
        shared = segment.for_others
        known = path.following.get(key)
        if known is None or known.segment != shared:
            known = self._add(path, shared, key_block, key)
        elif self._lease(known):
            return known  # another request wrote the same
        lease = blocks[slice(*shared.lease)]
        known.lease_hashes = self._new_hashes(len(lease))
        for block_hash, block in zip(known.lease_hashes, lease, strict=True):
            cache_block(self._pool, block, block_hash, self._group_id)
        known.seen_cached = True
        self.published += 1
        return known

    def find(self, block_hashes: Sequence[BlockHash], max_tokens: int) -> list[KVCacheBlock]:
        """The cached segments that a request's tokens begin with.

        Args:
            block_hashes: vLLM's of the request.
            max_tokens: that it may take from the cache.

        Returns:
            The blocks of all of them, null blocks before each lease.
        """
        path, blocks = self._root, list[KVCacheBlock]()
        while step := self._longest(path, block_hashes, max_tokens // self._block_size):
            path, lease = step
            assert path.segment is not None
            blocks += [self._pool.null_block] * path.segment.num_freed_blocks + lease
        return blocks

    def path_of(
        self, segments: Sequence[SharedSegment], block_hashes: Sequence[BlockHash]
    ) -> Prefix:
        """The path of segments that :meth:`find` has just found."""
        path = self._root
        for segment in segments:
            path = next(one for one in self._matching(path, block_hashes) if one.segment == segment)
        return path

    def _new_hashes(self, count: int) -> list[BlockHash]:
        names = (f"{self._name}-{self.published}-{number}" for number in range(count))
        return [BlockHash(sha256(name.encode()).digest()) for name in names]

    def _add(self, path: Prefix, segment: SharedSegment, key_block: int, key: BlockHash) -> Prefix:
        if self._paths >= self._pool.num_gpu_blocks:  # more than can have a lease in the cache
            self._sweep()
        replaced = path.following.get(key)
        if replaced is not None:
            replaced.forgotten = True
        self._paths += 1
        path.following[key] = made = Prefix(segment, key_block)
        return made

    def _sweep(self) -> None:
        """Forget the paths that end without a lease in the cache."""
        below = [(self._root, key, one) for key, one in self._root.following.items()]
        for _, _, path in below:  # which grows meanwhile: parents stand before what follows them
            below += [(path, key, one) for key, one in path.following.items()]
        self._paths = 0
        for parent, key, path in reversed(below):
            if path.following or self._lease(path):
                self._paths += 1
            else:
                path.forgotten = True
                del parent.following[key]

    def _longest(
        self, path: Prefix, block_hashes: Sequence[BlockHash], max_blocks: int
    ) -> tuple[Prefix, list[KVCacheBlock]] | None:
        fitting = [one for one in self._matching(path, block_hashes) if one.end_block <= max_blocks]
        for one in sorted(fitting, key=lambda one: one.end_block, reverse=True):
            if lease := self._lease(one):
                return one, lease
        return None

    def _matching(self, path: Prefix, block_hashes: Sequence[BlockHash]) -> Iterator[Prefix]:
        """Paths that go on with the request's tokens, looked for on the side that has fewer."""
        if len(path.following) <= len(block_hashes) - path.end_block:
            for key, one in path.following.items():
                if one.key_block < len(block_hashes) and block_hashes[one.key_block] == key:
                    yield one
            return
        for number in range(path.end_block, len(block_hashes)):
            if found := path.following.get(block_hashes[number]):
                yield found

    def _lease(self, path: Prefix) -> list[KVCacheBlock] | None:
        """The blocks of its last lease; None where one of them is gone."""
        found = []
        for block_hash in path.lease_hashes:
            cached = self._pool.get_cached_block(block_hash, [self._group_id])
            if cached is None:
                self.evicted += path.seen_cached
                path.seen_cached = False
                return None
            found.append(cached[0])
        return found


def shared_segments(blocks: Sequence[KVCacheBlock]) -> tuple[SharedSegment, ...]:
    """The segments in what :meth:`SharedPrefixes.find` found: null blocks go before each lease.

    Args:
        blocks: a request's that it got from the cache; without null blocks they are full size.
    """
    runs = [(null, len(list(run))) for null, run in groupby(blocks, lambda block: block.is_null)]
    if not runs or not runs[0][0]:
        return ()
    segments, begin = list[SharedSegment](), 0
    for (_, freed), (_, kept) in zip(runs[::2], runs[1::2], strict=True):
        segments.append(SharedSegment(begin, begin + freed, begin + freed + kept))
        begin += freed + kept
    return tuple(segments)
