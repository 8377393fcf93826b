"""Lists of numbers and sides of pictures."""

from __future__ import annotations

import pytest

from libreflux.errors import RecipeError
from libreflux.values import check_side, is_side, listed_numbers, number_list


def test_ranges_and_lists() -> None:
    assert number_list("1:6:1", "x") == (1, 2, 3, 4, 5, 6)
    assert number_list("1:3", "x") == (1, 2, 3)
    assert number_list("1,3.5", "x") == (1, 3.5)
    assert number_list("0:0.3:0.1", "x") == (0, 0.1, 0.2, 0.3)
    assert number_list("1,0.75,0.123456789012,0.25", "x") == (1, 0.75, 0.123456789012, 0.25)  # not rounded


@pytest.mark.parametrize("wrong", ["", "a", "1:2:3:4", "3:1", "1:2:0", "1:2:-1", "nan", "0:inf", "-1", "0:1e9", "1,,2"])
def test_what_is_no_list_is_refused(wrong: str) -> None:
    with pytest.raises(RecipeError, match=r"^x: "):
        number_list(wrong, "x")


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"cannot be 1\.5; hint: use whole numbers from 0"):
        number_list("1.5", "x", whole=True)
    with pytest.raises(RecipeError, match="cannot be 0; hint: use whole numbers from 1"):
        number_list("0", "x", whole=True, least=1)
    with pytest.raises(RecipeError, match="cannot be 11; hint: use numbers from 0 to 10"):
        number_list("11", "x", most=10)


def test_a_number_that_is_there_twice_is_refused_where_numbers_are_distinct() -> None:
    with pytest.raises(RecipeError, match="has 3 twice"):
        number_list("1:6:1,3", "x")
    assert number_list("1,1", "x", distinct=False) == (1, 1)


def test_sides_are_multiples_of_16() -> None:
    assert [side for side in range(0, 50) if is_side(side)] == [16, 32, 48]
    check_side(None, "--width")
    check_side(64, "--width")
    with pytest.raises(RecipeError, match="--width: 100 is not a multiple of 16; hint: use 96"):
        check_side(100, "--width")
    with pytest.raises(RecipeError, match="use 16"):
        check_side(1, "--width")


def test_numbers_from_python_are_one_several_or_a_text() -> None:
    assert listed_numbers(None, "x") is None
    assert listed_numbers(3, "x") == (3,)
    assert listed_numbers("1:3", "x") == (1, 2, 3)
    assert listed_numbers((number for number in (1, 0.5)), "x") == (1, 0.5)
    with pytest.raises(RecipeError, match="x: cannot be <object"):
        listed_numbers(object(), "x")
