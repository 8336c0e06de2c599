"""The allocator of pages, by random sequences of its operations."""

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis_settings import examples

from grinqh_jax.serving.pages import PageAllocator

SIZE = 4

operations = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.lists(st.integers(0, 1), max_size=24), st.integers(0, 3)),
        st.tuples(st.just("end"), st.integers(0, 9)),
        st.tuples(st.just("forget")),
    ),
    max_size=60,
)


@given(operations, st.integers(1, 12))
@examples(60, in_ci=1000)
def test_no_page_is_lost_or_given_to_two_texts_that_differ(operations, num_pages):
    allocator = PageAllocator(num_pages, SIZE)
    texts: list[tuple[list[int], list[int]]] = []
    content: dict[int, tuple[int, ...]] = {}  # tokens up to the end of each page that has been written
    for operation in operations:
        match operation:
            case ("start", tokens, answer):
                before = allocator.available
                shared = allocator.share(tokens)
                for i, page in enumerate(shared):
                    assert content[page] == tuple(tokens[: (i + 1) * SIZE])
                own = allocator.allocate(allocator.pages_for(len(tokens) + answer) - len(shared))
                if own is None:
                    allocator.release(shared)
                    assert allocator.available == before
                else:
                    in_use = {page for _, pages in texts for page in pages}
                    assert not in_use & set(own)
                    assert not set(shared) & set(own)
                    pages = shared + own
                    for i in range(len(shared), len(tokens) // SIZE):
                        content[pages[i]] = tuple(tokens[: (i + 1) * SIZE])
                    allocator.register(tokens, pages)
                    texts.append((tokens, pages))
            case ("end", number):
                if texts:
                    allocator.release(texts.pop(number % len(texts))[1])
            case ("forget",):
                allocator.forget()
        used = [page for _, pages in texts for page in pages]
        assert [allocator.users(page) for page in range(num_pages)] == [
            used.count(page) for page in range(num_pages)
        ]
        assert allocator.in_use == len(set(used))
        assert allocator.available == num_pages - len(set(used))
    for _, pages in texts:
        allocator.release(pages)
    assert allocator.available == num_pages
    assert allocator.allocate(num_pages) is not None


def test_the_least_recently_used_prefix_is_evicted_and_its_end_first():
    allocator = PageAllocator(4, SIZE)
    one, two = [1] * 8, [2] * 8
    for text in (one, two, one):
        pages = allocator.share(text) or allocator.allocate(2)
        allocator.register(text, pages)
        allocator.release(pages)
    assert allocator.kept == 4
    taken = allocator.allocate(1)
    assert len(allocator.share(two)) == 1
    assert len(allocator.share(one)) == 2
    assert allocator.allocate(1) is None
    allocator.release(taken)
    assert allocator.allocate(1) == taken


def test_prefixes_are_shared_in_units():
    allocator = PageAllocator(8, SIZE)
    pages = allocator.allocate(3)
    allocator.register([7] * 12, pages)
    assert allocator.share([7] * 12, unit=2) == pages[:2]
    assert allocator.share([7] * 7, unit=2) == []
    assert [allocator.users(page) for page in pages] == [2, 2, 1]


def test_a_page_is_released_once():
    allocator = PageAllocator(2, SIZE)
    pages = allocator.allocate(1)
    allocator.release(pages)
    with pytest.raises(ValueError, match="page 0 is released, but no request uses it"):
        allocator.release(pages)
