"""Which texts to run together: a batch is as wide as its longest row, and what is behind a shorter one is wasted."""

from __future__ import annotations

from collections.abc import Sequence


def group_by_length(lengths: Sequence[int], forward_tokens: int) -> list[list[int]]:
    """Split texts into groups for one forward each, so that the tokens run, padding included, cost least.

    Of all ways to cut the texts, sorted by length, the one with the least sum over groups of
    ``rows * longest + forward_tokens``.

    >>> group_by_length([5, 300, 6, 290], forward_tokens=64)
    [[0, 2], [1, 3]]
    >>> group_by_length([5, 300, 6, 290], forward_tokens=4096)
    [[0, 1, 2, 3]]

    Args:
        lengths: tokens of each text, at least one text.
        forward_tokens: how many more tokens of a forward cost as much as one more forward.

    Returns:
        Indices of the texts of each group, rising; groups by rising length.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    # Of the first n texts in this order: the least cost, and where its last group starts.
    least: list[tuple[int, int]] = [(0, 0)]
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        costs = ((least[start][0] + (stop - start) * longest + forward_tokens, start) for start in range(stop))
        least.append(min(costs))
    groups = []
    stop = len(order)
    while stop:
        start = least[stop][1]
        groups.append(sorted(order[start:stop]))
        stop = start
    return groups[::-1]
