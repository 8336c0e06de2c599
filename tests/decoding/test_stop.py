"""Stop strings in a stream that comes in pieces of any length."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples

from grinqh_jax.decoding.stop import StopStrings


def test_a_possible_start_is_held_back_and_released():
    stop = StopStrings(["\n\nQ:"])
    assert stop.push("one\n") == "one"
    assert stop.push("\nQ") == ""
    assert stop.push("uite") == "\n\nQuite"
    assert not stop.met
    assert stop.push("\n\nQ: and more") == ""
    assert stop.met
    assert stop.push("ignored") == stop.flush() == ""


def test_without_strings_everything_passes():
    stop = StopStrings([])
    assert stop.push("abc") == "abc"
    assert stop.flush() == ""


@examples(100)
@given(
    text=st.text("ab", max_size=30),
    strings=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
def test_any_division_gives_the_text_before_the_first_stop_string(text, strings, cuts):
    stop, passed, rest = StopStrings(strings), "", text
    for cut in cuts:
        passed += stop.push(rest[:cut])
        rest = rest[cut:]
        if stop.met:
            break
    passed += stop.flush()
    # The stream ends at the stop string that is complete first, even if another one starts earlier.
    ends = [(text.find(s) + len(s), text.find(s)) for s in strings if s in text]
    assert stop.met == bool(ends)
    if not ends:
        assert passed == text
    else:
        assert text.startswith(passed)
        assert len(passed) in {start for _, start in ends}
        assert len(passed) <= max(start for _, start in ends)
