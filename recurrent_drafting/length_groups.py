"""Which texts to run together: a batch is as wide as its longest row, and what is behind a shorter one is wasted."""

from __future__ import annotations

from collections.abc import Sequence


def group_by_length(lengths: Sequence[int], call_tokens: int) -> list[list[int]]:
    """Split texts into groups for one call each, so that the tokens run, padding included, cost least.

    Of all ways to cut the texts, sorted by length, the one with the least sum over groups of
    ``rows * longest + call_tokens``.

    >>> group_by_length([5, 300, 6, 290], call_tokens=64)
    [[0, 2], [1, 3]]
    >>> group_by_length([5, 300, 6, 290], call_tokens=4096)
    [[0, 1, 2, 3]]

    Args:
        lengths: tokens of each text, at least one text.
        call_tokens: how many more tokens in a call cost as much as one more call.

    Returns:
        Indices of the texts of each group, rising; groups by rising length.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    runs = cut_into_runs([lengths[index] for index in order], call_tokens)
    return [sorted(order[start:stop]) for start, stop in runs]


def cut_into_runs(lengths: Sequence[int], call_tokens: int) -> list[tuple[int, int]]:
    """Do what ``group_by_length`` does with texts in an order that must stay; return where each run starts and stops.

    >>> cut_into_runs([5, 300, 290, 6], call_tokens=64)
    [(0, 1), (1, 3), (3, 4)]
    """
    longest = max(lengths, default=0)
    if longest * len(lengths) - sum(lengths) <= call_tokens:
        return [(0, len(lengths))]
    # Of the first n texts: the least cost, and where their last run starts.
    least: list[tuple[int, int]] = [(0, 0)]
    for stop in range(1, len(lengths) + 1):
        longest, costs = 0, []
        for start in range(stop - 1, -1, -1):
            longest = max(longest, lengths[start])
            costs.append((least[start][0] + (stop - start) * longest + call_tokens, start))
        least.append(min(costs))
    runs = []
    stop = len(lengths)
    while stop:
        runs.append((least[stop][1], stop))
        stop = runs[-1][0]
    return runs[::-1]
