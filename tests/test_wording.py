import pytest

from powertrain.wording import counted


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (1685, "1,685 steps"), (-1, "-1 steps")]
)
def test_the_noun_agrees_with_its_count(count, text):
    assert counted(count, "step") == text


def test_a_noun_may_take_more_than_an_s():
    assert [counted(n, "process", "processes") for n in (1, 2)] == ["1 process", "2 processes"]
