"""Windows of users' sequences: what is a history, what its target."""

from __future__ import annotations

import numpy as np
import pytest

from recbole_mm.data.sequences import group_by_user
from recbole_mm.data.windows import draw_windows

LENGTHS = [1, 2, 3, 5, 8, 30]
USERS = np.repeat(np.arange(1, 7), LENGTHS)
SEQUENCES = group_by_user(USERS, np.arange(1, len(USERS) + 1))


@pytest.mark.parametrize("how", ["full", "official"])
def test_a_window_is_a_stretch_of_one_user(how: str) -> None:
    for epoch in range(40):
        windows = draw_windows(SEQUENCES, 10, how, seed=3, epoch=epoch)
        assert windows.owner.tolist() == [1, 2, 3, 4, 5]  # one item is no window
        for owner, begin, target in zip(windows.owner, windows.begin, windows.target, strict=True):
            assert SEQUENCES.offsets[owner] <= begin < target < SEQUENCES.offsets[owner + 1]
            assert target - begin <= 10


def test_full_windows_reach_every_position_and_all_that_is_before() -> None:
    seen = set()
    for epoch in range(300):
        windows = draw_windows(SEQUENCES, 4, "full", seed=0, epoch=epoch)
        first = SEQUENCES.offsets[windows.owner]
        assert (windows.lengths() == np.minimum(4, windows.target - first)).all()
        seen |= set(windows.target[windows.owner == 4] - first[windows.owner == 4])
    assert seen == set(range(1, 8))


def test_official_windows_are_cut_as_the_papers_code_cuts_them() -> None:
    sizes: dict[int, set[int]] = {}
    for epoch in range(400):
        windows = draw_windows(SEQUENCES, 10, "official", seed=0, epoch=epoch)
        for owner, size in zip(windows.owner, windows.lengths(), strict=True):
            sizes.setdefault(int(owner), set()).add(int(size))
    assert sizes[1] == {1}  # the whole of two items
    assert sizes[2] == {2}
    assert sizes[5] == set(range(2, 10))  # 2..4 and 2..9


def test_windows_are_a_function_of_seed_and_epoch() -> None:
    one, same, other = (draw_windows(SEQUENCES, 10, "full", 1, epoch) for epoch in (2, 2, 3))
    assert one.target.tolist() == same.target.tolist()
    assert one.target.tolist() != other.target.tolist()
