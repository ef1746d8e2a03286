"""Stop strings in a text that comes in pieces."""

import hypothesis
import pytest
from hypothesis import strategies as st

from llama_jax.generate.stop import StopStrings


def passed(stops, pieces) -> tuple[list[str], bool]:
    """What is passed on at each piece and at the end, and whether a stop was found."""
    stop = StopStrings(stops)
    out = [stop.feed(piece) for piece in pieces]
    return [*out, stop.flush()], stop.found


def cut(stops, text) -> str:
    """The text before the stop string that is whole first."""
    for end in range(len(text) + 1):
        places = [end - len(s) for s in stops if text[:end].endswith(s)]
        if places:
            return text[: min(places)]
    return text


@pytest.mark.parametrize(
    ("stops", "pieces", "out"),
    [
        # None, and one within a piece.
        ([], ["ab", "c"], ["ab", "c", ""]),
        (["b"], ["abc", "d"], ["a", "", ""]),
        # At the start; across borders; at the very end.
        (["ab"], ["ab"], ["", ""]),
        (["abc"], ["xa", "b", "cy", "z"], ["x", "", "", "", ""]),
        (["end"], ["the ", "e", "nd"], ["the ", "", "", ""]),
        # Held back, then let go: at once, in part, at the end.
        (["abc"], ["ab", "d"], ["", "abd", ""]),
        (["abc"], ["ab", "ab", "x"], ["", "ab", "abx", ""]),
        (["abc"], ["xab"], ["x", "ab"]),
        (["aab"], ["aa", "a", "b"], ["", "a", "", ""]),
        # Several: the first in the text, the longest that is held for, one in another.
        (["z", "b"], ["abz"], ["a", ""]),
        (["abc", "bd"], ["ab", "d"], ["", "a", ""]),
        (["abc", "b"], ["abc"], ["a", ""]),
        (["abc", "bc"], ["ab", "c"], ["", "", ""]),
        # An empty piece, and a character of several bytes.
        (["é!"], ["", "é", "", "!"], ["", "", "", "", ""]),
    ],
)
def test_what_is_passed_on(stops, pieces, out):
    found, stopped = passed(stops, pieces)
    assert found == out
    assert "".join(found) == cut(stops, "".join(pieces))
    assert stopped == any(stop in "".join(pieces) for stop in stops)


@hypothesis.given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_borders_between_pieces_change_nothing(stops, pieces):
    text = "".join(pieces)
    out, found = passed(stops, pieces)
    assert "".join(out) == cut(stops, text)
    assert found == any(stop in text for stop in stops)
    # Nothing is passed on that has to be taken back, and no more held than needed.
    shown = 0
    for i, part in enumerate(out[:-1], start=1):
        shown += len(part)
        so_far = "".join(pieces[:i])
        if not any(stop in so_far for stop in stops):
            rest = so_far[shown:]
            assert rest == "" or any(stop.startswith(rest) for stop in stops)
