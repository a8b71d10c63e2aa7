"""Capacity assignment against a slow twin in plain Python, ties included; sizes never above the slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import F64

from coga.grouping import make_grouping, pool
from coga.grouping.choice import nearest
from coga.kernels import dispatch
from coga.kernels.capacity import assign
from coga.kernels.reference import rounding_step


def slow_assign(score: list[list[float]], slots: int, step: float) -> list[int]:
    """One window, in the words of DESIGN section 4."""
    groups = range(len(score[0]))
    rounded = [[round(x / step) for x in row] for row in score]
    placed: dict[int, int] = {}
    room = dict.fromkeys(groups, slots)
    while len(placed) < len(score):
        proposals: dict[int, list[int]] = {g: [] for g in groups}
        for token, row in enumerate(rounded):
            if token not in placed:
                proposals[min((g for g in groups if room[g]), key=lambda g: (-row[g], g))].append(token)
        for g, tokens in proposals.items():
            for token in sorted(tokens, key=lambda t: (-rounded[t][g], t))[: room[g]]:
                placed[token] = g
                room[g] -= 1
    return [placed[t] for t in range(len(score))]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_assign_is_its_slow_twin(data):
    """Few distinct scores make many ties; some differ by less than the rounding step."""
    width, groups = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    slots = data.draw(st.integers(-(-width // groups), width))
    windows = data.draw(st.integers(1, 2))
    value = st.sampled_from([-1.0, 0.0, 0.25, 1.0, 1.0 + 2.0**-30, 50.0])
    score = torch.tensor(
        data.draw(st.lists(value, min_size=windows * width * groups, max_size=windows * width * groups)),
        dtype=torch.float32,
    ).view(windows, width, groups)
    got = dispatch.assign(score, slots)
    step = rounding_step(torch.float32)
    assert got.tolist() == [slow_assign(window, slots, step) for window in score.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("slots", [4, 5, 6, 16])
def test_assign_of_random_scores(dtype, slots):
    score = torch.randn(5, 16, 4, dtype=dtype)
    got = assign(score, slots, rounding_step(dtype))
    assert got.tolist() == [slow_assign(w, slots, rounding_step(dtype)) for w in score.tolist()]
    size = torch.nn.functional.one_hot(got, 4).sum(1)
    assert size.max() <= slots and (size.sum(-1) == 16).all()
    if slots == 16:
        assert torch.equal(got, score.argmax(-1))


def test_windows_do_not_see_each_other():
    """A window's groups are the same alone, beside calm windows and beside wild ones."""
    score = torch.randn(3, 16, 4, dtype=F64)
    score[1] *= 1e4
    together = assign(score, 4, rounding_step(F64))
    for n in range(3):
        assert torch.equal(assign(score[n : n + 1], 4, rounding_step(F64))[0], together[n])


def test_equal_scores_fill_the_groups_in_order():
    got = assign(torch.zeros(1, 8, 2), 4, 1.0)
    assert got.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]


def test_too_few_slots_are_refused():
    with pytest.raises(ValueError, match=r"slots=3: 2 groups of 3 cannot hold 8 tokens"):
        assign(torch.zeros(1, 8, 2), 3, 1.0)


def test_nearest_ignores_one_ulp_and_takes_the_lower_index():
    assert nearest(torch.tensor([[1.0, 1.0 + 1e-6, 0.0], [0.0, 2.0, 2.0], [3.0, 1.0, 2.0]])).tolist() == [
        0,
        1,
        0,
    ]


def test_slot_order_offsets_sizes_and_means():
    index = torch.tensor([[[1, 0, 1, 1], [2, 2, 0, 2]]])
    groups = make_grouping(index, 3)
    assert groups.order_BS.tolist() == [[1, 0, 2, 3, 6, 4, 5, 7]]
    assert groups.size_BM.tolist() == [[1, 3, 0, 1, 0, 3]]
    assert groups.offset_BM.tolist() == [[0, 1, 4, 4, 5, 5]]
    mean = pool(torch.arange(8, dtype=F64)[None, :, None], groups)[0, :, 0]
    assert mean.tolist() == pytest.approx([1, 5 / 3, 0, 6, 0, 16 / 3])
