"""The verifier's cache against a plain list of lists."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recurrent_drafting.kv_cache import VerifierCache

# heads, key width and value width per layer: alike, mixed head counts, mixed widths
SHAPES = [[(2, 3, 3), (2, 3, 3)], [(2, 3, 3), (1, 3, 3)], [(2, 3, 2), (1, 4, 3)]]
many = settings(max_examples=80, deadline=None, database=None, derandomize=True)


def states(numbers: list[list[int]], heads: int, dim: int, tag: int) -> Tensor:
    """Spread one number per entry, ``[B][n]``, to distinct values ``[B, heads, n, dim]``."""
    cells = torch.arange(heads * dim, dtype=torch.float64).view(1, heads, 1, dim)
    return torch.tensor(numbers, dtype=torch.float64)[:, None, :, None] * 100 + cells + tag / 2


class Model:
    """The list of lists: the number of each committed entry, per row."""

    def __init__(self, shapes: list[tuple[int, int, int]], batch: int, capacity: int) -> None:
        self.cache = VerifierCache(len(shapes), batch, capacity)
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.fresh: list[list[int]] = []
        self._shapes = shapes
        self._numbers = itertools.count(1)

    @torch.inference_mode()
    def append(self, count: int) -> list[Tensor]:
        """Write new entries to every layer, as a verifier's forward does, and check all that it sees then."""
        self.fresh = [list(itertools.islice(self._numbers, count)) for _ in self.rows]
        stop = max(map(len, self.rows)) + count
        views: list[Tensor] = []
        for layer, (heads, *dims) in enumerate(self._shapes):
            written = [states(self.fresh, heads, dim, part) for part, dim in enumerate(dims)]
            for part, (view, dim) in enumerate(zip(self.cache.update(*written, layer), dims, strict=True)):
                assert view.shape == (len(self.rows), heads, stop, dim)
                assert torch.isfinite(view).all()
                for row, (old, new) in enumerate(zip(self.rows, self.fresh, strict=True)):
                    expected = states([old + new], heads, dim, part)[0]
                    assert torch.equal(view[row, :, : len(old) + count], expected)
                views.append(view)
        assert self.cache.lengths == [len(row) for row in self.rows]
        return views

    def keep(self, paths: list[list[int]]) -> None:
        self.cache.keep(paths)
        self.rows = [row + [new[i] for i in path] for row, new, path in zip(self.rows, self.fresh, paths, strict=True)]

    def select(self, rows: list[int]) -> None:
        self.cache.select(rows)
        self.rows = [self.rows[row] for row in rows]


def test_worked_example_of_the_docstring() -> None:
    cache = VerifierCache(1, 1, 10)
    cache.append(0, *[states([[1, 2, 3]], 1, 1, 0)] * 2)
    cache.keep([[0, 1, 2]])
    keys, _ = cache.append(0, *[states([[10, 11, 12, 13]], 1, 1, 0)] * 2)
    assert keys.flatten().tolist() == [100, 200, 300, 1000, 1100, 1200, 1300]
    cache.keep([[0, 2, 3]])
    assert cache.lengths == [6]
    assert keys.flatten()[:6].tolist() == [100, 200, 300, 1000, 1200, 1300]


@many
@given(st.data())
def test_any_use_equals_a_list_of_lists(data: st.DataObject) -> None:
    model = Model(data.draw(st.sampled_from(SHAPES)), data.draw(st.integers(1, 4)), capacity=24)
    for _ in range(data.draw(st.integers(1, 5))):
        count = data.draw(st.integers(1, 4))
        model.append(count)
        rest = st.lists(st.sampled_from(range(1, count)), unique=True).map(sorted) if count > 1 else st.just([])
        model.keep([[0, *data.draw(rest)] for _ in model.rows])
        if data.draw(st.booleans()):
            rows = st.lists(st.sampled_from(range(len(model.rows))), unique=True, min_size=1)
            model.select(data.draw(rows))
        assert model.cache.max_length == model.cache.get_seq_length() == max(map(len, model.rows))
    model.append(1)


@pytest.mark.parametrize("shapes", SHAPES)
def test_append_and_keep_work_in_place(shapes: list[tuple[int, int, int]]) -> None:
    model = Model(shapes, batch=3, capacity=20)
    first = [view.data_ptr() for view in model.append(3)]
    for paths in ([[0, 1, 2], [0, 2], [0]], [[0], [0, 2], [0, 1]], [[0, 2], [0, 1, 2], [0]]):
        model.keep(paths)
        assert [view.data_ptr() for view in model.append(3)] == first
    assert len(set(first)) == len(first)


def test_entries_that_were_not_kept_are_overwritten_in_every_row() -> None:
    model = Model(SHAPES[0], batch=2, capacity=12)
    model.append(4)
    model.keep([[0], [0, 3]])
    model.append(4)
    model.keep([[0, 1], [0]])
    model.append(2)
    assert model.cache.lengths == [3, 3]


def test_forward_that_was_not_kept_leaves_no_trace() -> None:
    """A tree of another size may be tried before anything is committed."""
    model = Model(SHAPES[0], batch=2, capacity=12)
    model.append(3)
    model.keep([[0], [0, 1, 2]])
    for count in (4, 2, 5):
        model.append(count)
    model.select([1, 0])
    model.append(5)
    model.keep([[0, 4], [0]])
    model.append(1)


def test_rows_that_leave_from_the_front_copy_no_storage() -> None:
    model = Model(SHAPES[0], batch=4, capacity=20)
    first = [view.data_ptr() for view in model.append(3)]
    model.keep([[0], [0, 1, 2], [0, 2], [0, 1]])
    model.select([3, 1, 2])
    assert [view.data_ptr() for view in model.append(2)] == first
    model.keep([[0, 1], [0], [0]])
    model.select([2])
    assert [view.data_ptr() for view in model.append(1)] == first


@pytest.mark.parametrize("shapes", SHAPES)
def test_a_cache_adopts_rows_that_were_filled_elsewhere(shapes: list[tuple[int, int, int]]) -> None:
    """Rows 2 and 0 come from one cache, row 1 from another; each goes on behind its own length."""
    whole = Model(shapes, batch=3, capacity=12)
    for rows, count, paths in (([2, 0], 4, [[0, 1, 2, 3], [0, 1]]), ([1], 3, [[0, 1, 2]])):
        part = Model(shapes, batch=len(rows), capacity=count)
        part.append(count)
        part.keep(paths)
        whole.cache.adopt(rows, part.cache)
        for row, numbers in zip(rows, part.rows, strict=True):
            whole.rows[row] = numbers
    assert whole.cache.lengths == [2, 3, 4]
    whole.append(2)
    whole.keep([[0, 1], [0], [0]])
    whole.append(1)


def test_writing_past_the_capacity_raises_and_names_both_sizes() -> None:
    model = Model(SHAPES[0], batch=2, capacity=6)
    model.append(4)
    model.keep([[0], [0, 1, 2]])
    model.append(3)  # 3 + 3: full to the last slot
    with pytest.raises(IndexError, match="holds 6 tokens per row, asked to write up to 7"):
        model.append(4)


def test_a_row_that_leaves_makes_room() -> None:
    model = Model(SHAPES[0], batch=2, capacity=6)
    model.append(4)
    model.keep([[0], [0, 1, 2, 3]])
    model.select([0])
    model.append(5)


def test_cache_tells_transformers_its_sizes() -> None:
    cache = VerifierCache(2, 2, 9)
    assert (cache.get_seq_length(), cache.get_max_length()) == (0, 9)
    model = Model(SHAPES[0], batch=2, capacity=9)
    model.append(4)
    model.keep([[0, 1], [0, 1, 2]])
    for layer in model.cache.layers:
        assert layer.is_sliding is False
        assert layer.get_mask_sizes(4) == (7, 0)
        assert layer.get_seq_length() == 3
        assert layer.get_max_length() == layer.get_max_cache_shape() == 9


def test_cache_without_rows_is_empty() -> None:
    assert VerifierCache(2, 0, 5).max_length == 0
