"""Places of tensors in one allocation."""

from hypothesis import given
from hypothesis import strategies as st

from sf_compile.cuda.arena import ALIGNMENT, Lifetime, plan


@st.composite
def lifetimes(draw):
    first = draw(st.integers(0, 20))
    return Lifetime(draw(st.integers(1, 5000)), first, first + draw(st.integers(0, 6)))


@given(st.lists(lifetimes(), max_size=24))
def test_no_two_tensors_that_some_launch_needs_overlap(lives):
    arena = plan(lives)
    assert all(offset % ALIGNMENT == 0 for offset in arena.offsets)
    ends = [offset + life.bytes for offset, life in zip(arena.offsets, lives, strict=True)]
    assert all(end <= arena.bytes for end in ends)
    for i, one in enumerate(lives):
        for j in range(i):
            if one.first <= lives[j].last and lives[j].first <= one.last:
                assert ends[i] <= arena.offsets[j] or ends[j] <= arena.offsets[i]
    rounded = [-(-life.bytes // ALIGNMENT) * ALIGNMENT for life in lives]
    assert arena.bytes <= sum(rounded)


def test_a_chain_of_equal_tensors_takes_the_memory_of_two():
    arena = plan([Lifetime(1000, i, i + 1) for i in range(10)])
    assert arena.bytes == 2 * 1024
    assert str(arena).splitlines()[:2] == [
        "10 buffers of 10240 bytes in 2048",
        "  launches   0 to   1  offset            0          1000 bytes",
    ]


def test_nothing_to_place():
    assert plan([]).bytes == 0
