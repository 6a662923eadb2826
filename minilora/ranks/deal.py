"""Which rank goes through which streams of a step."""

from collections.abc import Sequence


def deal(tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Numbers of streams for each rank: the longest stream first, each to the rank that has the fewest tokens so far.

    tokens: of each stream. Every rank computes the same answer, so nothing is exchanged. The fullest rank has at most 4/3 of what the
    best deal would give it (Graham, 1969, Bounds on multiprocessing timing anomalies).
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for stream in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        dealt[rank].append(stream)
        load[rank] += tokens[stream]
    return [sorted(streams) for streams in dealt]


def imbalance(tokens: Sequence[int], ranks: int) -> float:
    """Tokens of the fullest rank as a multiple of the mean: 1.0 where no rank waits for another."""
    most = max(sum(tokens[i] for i in streams) for streams in deal(tokens, ranks))
    return most * ranks / sum(tokens)
