"""Texts that are nearly the same: MinHash to find candidates, the exact Jaccard similarity to decide."""

from collections.abc import Iterator, Sequence
from zlib import crc32

from datasketch import MinHash, MinHashLSH

NUM_WORDS = 3
"""Of a shingle."""
NUM_PERMUTATIONS = 64
BATCH = 1000
"""Texts hashed at a time."""


def near_duplicates(texts: Sequence[str], similarity: float) -> Iterator[tuple[int, int, float]]:
    """(index, index of the earlier text that it repeats, their similarity) of each that repeats one that is kept.

    similarity: Jaccard's of the sets of three-word runs, in (0, 1]. MinHash (Broder, 1997) with 64 permutations and
    banding misses few pairs above it and none is reported below it. Memory: signatures of the texts that are kept.
    """
    # Towards more candidates: each is verified, a missed one is not. Above 0.9 there are too few bands.
    index = MinHashLSH(threshold=min(similarity, 0.9), num_perm=NUM_PERMUTATIONS, weights=(0.2, 0.8))
    for start in range(0, len(texts), BATCH):
        shingles = [_shingles(text) for text in texts[start : start + BATCH]]
        encoded = [[shingle.encode() for shingle in of_text] for of_text in shingles]
        hashes = MinHash.bulk(encoded, num_perm=NUM_PERMUTATIONS, hashfunc=crc32)
        for number, (own, minhash) in enumerate(zip(shingles, hashes, strict=True), start=start):
            best, earlier = max(
                ((_jaccard(own, _shingles(texts[other])), -other) for other in index.query(minhash)),
                default=(0.0, 0),
            )
            if best >= similarity:
                yield number, -earlier, best
            else:
                index.insert(number, minhash, check_duplication=False)


def _shingles(text: str) -> set[str]:
    words = text.split()
    runs = range(max(1, len(words) - NUM_WORDS + 1))
    return {" ".join(words[i : i + NUM_WORDS]) for i in runs}


def _jaccard(a: set[str], b: set[str]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)
