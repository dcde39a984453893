from dataclasses import dataclass, field
from typing import Literal

import pytest

from powertrain.schema import ConfigError, build, leaf_keys, nearest


@dataclass(frozen=True)
class Inner:
    width: int = 4
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.width <= 0:
            raise ValueError(f"width={self.width} is not allowed: it must be positive")


@dataclass(frozen=True)
class Outer:
    seed: int
    inner: Inner = field(default_factory=Inner)
    files: list[str] = field(default_factory=list)
    betas: tuple[float, float] = (0.9, 0.95)
    limit: int | None = None
    name: str | None = None


def test_builds_nested_values_with_the_declared_types():
    got = build(
        Outer, {"seed": 1e3, "inner": {"width": 8.0, "kind": "b"}, "files": ["x"], "betas": [1, 0.5], "name": 12}
    )
    assert got == Outer(1000, Inner(8, 0.1, "b"), ["x"], (1.0, 0.5), None, "12")
    assert type(got.seed) is int
    assert type(got.betas[0]) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 1, "iner": {}}, "unknown option 'iner': did you mean 'inner'?"),
        ({"seed": 1, "inner": {"widht": 3}}, "unknown option 'inner.widht': did you mean 'inner.width'?"),
        ({"seed": 1.5}, "seed=1.5 is not allowed: it must be an integer"),
        ({"seed": True}, "seed=True is not allowed"),
        ({"seed": 1, "limit": "x"}, "limit='x' is not allowed: it must be an integer or null"),
        ({"seed": 1, "inner": {"kind": "c"}}, "inner.kind='c' is not allowed: it must be one of 'a', 'b'"),
        ({"seed": 1, "inner": {"width": 0}}, "width=0 is not allowed: it must be positive"),
        ({"seed": 1, "betas": [1]}, "betas=[1] is not allowed: it must be [a number, a number]"),
        ({"seed": 1, "files": 3}, "files=3 is not allowed: it must be a list of a text"),
        ({}, "missing option seed"),
        ({"seed": 1, "inner": 3}, "inner must be a mapping of options, got 3"),
    ],
)
def test_each_mistake_is_one_clear_sentence(values, message):
    with pytest.raises(ConfigError) as caught:
        build(Outer, values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Columns:
    losses: tuple[float, ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()


def test_every_number_of_a_long_column_is_converted_and_checked():
    got = build(Columns, {"losses": [0.5, 2, 1.5], "rows": [[1, 2], [3.0, 4]]})
    assert got == Columns((0.5, 2.0, 1.5), ((1, 2), (3, 4)))
    assert [type(x) for x in (*got.losses, *got.rows[1])] == [float] * 3 + [int] * 2
    with pytest.raises(ConfigError, match=r"rows\[1\]\[1\]=True is not allowed: it must be an integer"):
        build(Columns, {"rows": [[1, 2], [3, True]]})
    with pytest.raises(ConfigError, match=r"losses\[2\]='2' is not allowed: it must be a number"):
        build(Columns, {"losses": [0.5, 1.5, "2"]})


def test_a_single_text_is_a_list_of_one():
    assert build(Outer, {"seed": 1, "files": "corpus/*.txt"}).files == ["corpus/*.txt"]


def test_leaf_keys_are_dotted_and_complete():
    assert set(leaf_keys(Outer)) == {
        "seed", "inner.width", "inner.rate", "inner.kind", "files", "betas", "limit", "name",
    }  # fmt: skip


def test_nearest_finds_a_key_by_its_last_word():
    assert nearest("width", ["inner.width", "seed"]) == "did you mean 'inner.width'?"
    assert nearest("zzz", ["b", "a"]) == "allowed: a, b"


def test_nearest_prefers_the_same_last_word_in_any_section():
    known = ["inner", "inner.with", "other.width", "seed"]
    assert nearest("inner.width", known) == "did you mean 'other.width'?"
    assert nearest("inner.width", [*known, "more.width"]) == "did you mean 'more.width' or 'other.width'?"
