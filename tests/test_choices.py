"""Which choice an answer names; what each form means is worked by hand (see also `test_grading`)."""

import pytest

from mlxvr.grading.choices import find_choice

OPTIONS = ("red", "A black dog", "Dr. Who", "12")


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("A", 0),
        ("b", 1),
        ("(D)", 3),
        ("**C**", 2),
        ("12", 3),
        ("a black dog", 1),
        ("A dog", None),
        ("C <> [1.0, 2.0]", 2),
        ("12 <> [1.0, 2.0]", 3),
        ("[1.0, 2.0]", None),
        ("E", None),
        ("", None),
        (None, None),
        ("Let's analyze: A or B?", None),
    ],
)
def test_the_index_of_a_choice(text, index):
    assert find_choice(text, OPTIONS) == index
    assert find_choice(text, ()) is None
