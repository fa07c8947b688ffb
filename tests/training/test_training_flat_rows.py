"""Rows of a pack that lie on one line: where each token is, and how attention takes rows from it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from milp_ray.training.flat import flat_rows, padded_length


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12))
def test_rows_lie_one_after_the_other_and_buckets_hold_each_token_once(lengths: list[int]) -> None:
    rows = flat_rows(lengths, torch.device("cpu"))
    assert rows.positions[0].tolist() == [i for length in lengths for i in range(length)]
    assert torch.equal(rows.gather[rows.places], torch.arange(sum(lengths)))
    first = 0
    for bucket in rows.buckets:
        n_places = bucket.n_rows * bucket.length
        # A row's tokens stand in order from the beginning of its padded row, and what is behind is padding.
        tokens = torch.nonzero((rows.places >= first) & (rows.places < first + n_places)).squeeze(1)
        places = rows.places[tokens] - first
        assert torch.equal(places % bucket.length, rows.positions[0][tokens])
        assert sorted([*places.tolist(), *bucket.padding.tolist()]) == list(range(n_places))
        first += n_places
    assert rows.gather.shape == (first,)


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6), n_heads=st.integers(1, 4))
def test_heads_are_taken_row_by_row_and_put_back(lengths: list[int], n_heads: int) -> None:
    rows = flat_rows(lengths, torch.device("cpu")).by_heads(n_heads)
    line = torch.randn(sum(lengths), n_heads, 2)
    parts = rows.take(line)
    assert torch.equal(rows.put(parts), line)
    by_row = sorted(line.split(lengths), key=lambda row: (padded_length(len(row)),))
    padded = [row for part in parts for row in part]
    for row, found in zip(by_row, padded, strict=True):
        assert torch.equal(found[:, : len(row)], row.transpose(0, 1))
    for part, padding in zip(parts, rows.padding, strict=True):
        part.view(-1, 2).index_fill_(0, padding, 7.0)
    assert torch.equal(rows.put(parts), line), "no token lies where the padding is"


@given(length=st.integers(1, 20000))
def test_a_rows_padding_depends_on_its_length_alone_and_is_small(length: int) -> None:
    padded = padded_length(length)
    assert length <= padded <= max(8, 1.25 * length + 8)
    assert padded_length(padded) == padded
