from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.text.transcripts import StopMatcher

PIECES = st.lists(st.text("ab<", max_size=3), max_size=12)
STOPS = st.lists(st.text("ab<", min_size=1, max_size=3), max_size=3)


@given(PIECES, STOPS)
def test_stops_at_the_first_match_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    got, seen = "", ""
    for piece in pieces:
        got += matcher.push(piece)
        seen += piece
        if any(stop in seen for stop in stops):
            assert matcher.stopped
            break
        assert seen.startswith(got)
    got += matcher.finish()
    at = min((seen.find(stop) for stop in stops if stop in seen), default=len(seen))
    assert got == seen[:at]


def test_stop_strings_are_not_looked_for_where_text_may_not_stop() -> None:
    matcher = StopMatcher(["b"])
    matcher.looking = False
    assert matcher.push("abc") == "abc"
    matcher.looking = True
    assert matcher.push("cba") == "c"
    assert matcher.stopped


def test_nothing_is_held_back_without_need() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the E") == "the "
    assert matcher.push("xit") == "Exit"
