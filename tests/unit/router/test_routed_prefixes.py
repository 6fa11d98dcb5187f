from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from forebay.router.routed_prefixes import RoutedPrefixes


def chain(letters: str) -> list[bytes]:
    """Hashes as chains have them: each stands for all letters up to its own."""
    return [letters[: end + 1].encode() for end in range(len(letters))]


def test_every_worker_has_its_own_run() -> None:
    routed = RoutedPrefixes(100)
    routed.add(chain("abcd"), "w0")
    routed.add(chain("abx"), "w1")
    assert routed.match(chain("abcde")) == {"w0": 4, "w1": 2}
    assert routed.match(chain("abx")) == {"w0": 2, "w1": 3}
    assert routed.match(chain("zzz")) == {}
    assert routed.match([]) == {}


def test_the_oldest_goes_first_and_ends_before_beginnings() -> None:
    routed = RoutedPrefixes(5)
    routed.add(chain("abc"), "w0")
    routed.add(chain("xyz"), "w1")
    assert len(routed) == 5
    assert routed.match(chain("abc")) == {"w0": 2}
    assert routed.match(chain("xyz")) == {"w1": 3}


def test_what_is_used_stays() -> None:
    routed = RoutedPrefixes(6)
    routed.add(chain("abc"), "w0")
    routed.add(chain("xyz"), "w1")
    routed.add(chain("abc"), "w0")
    routed.add(chain("m"), "w1")
    assert routed.match(chain("abc")) == {"w0": 3}
    assert routed.match(chain("xyz")) == {"w1": 2}


def test_it_starts_anew_when_too_many_workers_have_come_and_gone() -> None:
    routed = RoutedPrefixes(1 << 14)
    for number in range(4096):
        routed.add([b"block"], f"w{number}")
    assert len(routed.match([b"block"])) == 4096
    routed.add(chain("a"), "one more")
    assert routed.match([b"block"]) == {}
    assert routed.match(chain("a")) == {"one more": 1}


@given(
    st.lists(st.tuples(st.text("ab", max_size=6), st.integers(0, 3)), max_size=12),
    st.text("ab", max_size=6),
)
def test_it_agrees_with_a_list_of_what_was_sent(sent: list[tuple[str, int]], asked: str) -> None:
    routed = RoutedPrefixes(1000)
    wanted: dict[str, int] = {}
    for letters, number in sent:
        routed.add(chain(letters), f"w{number}")
        run = sum(asked.startswith(start) for start in set(accumulate(letters)))
        wanted[f"w{number}"] = max(run, wanted.get(f"w{number}", 0))
    assert routed.match(chain(asked)) == {worker: run for worker, run in wanted.items() if run}
