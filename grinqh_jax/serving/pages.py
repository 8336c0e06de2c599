"""The host's side of the paged KV cache: which page belongs to which request, and which prefixes are kept.

A page holds the keys and values of ``page_size`` consecutive positions. Requests with the same leading tokens
share the pages of these tokens. Only whole pages are shared, and a shared page is never written again: a
request writes from its first own page on, so copy on write never has a page to copy.
"""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np


class PageAllocator:
    """Assigns the pages of a cache, counts their users, and remembers the pages of prefixes.

    A page is free, in use by one or more requests, or kept: without users, but with a known prefix. Requests
    with this prefix reuse it. If no page is free, the least recently used kept page is evicted.

    Attributes:
      num_pages: Number of pages of the cache.
      page_size: Number of positions of a page.
      evicted: Number of evictions so far.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self.evicted = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._users = [0] * num_pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()  # oldest first

    @property
    def available(self) -> int:
        """Number of pages that ``allocate`` can assign: free ones and kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def in_use(self) -> int:
        """Number of pages with a user."""
        return self.num_pages - self.available

    @property
    def kept(self) -> int:
        """Number of pages without a user that hold a known prefix."""
        return len(self._kept)

    def users(self, page: int) -> int:
        """Returns the number of requests that use a page."""
        return self._users[page]

    def pages_for(self, positions: int) -> int:
        """Returns the number of pages of a text of this many positions."""
        return -(-positions // self.page_size)

    def share(self, tokens: Sequence[int], unit: int = 1) -> list[int]:
        """Finds the kept or used pages of the leading tokens of a text, and adds a user to each.

        Args:
          tokens: Leading tokens that may come from shared pages.
          unit: The number of pages is a multiple of this.

        Returns:
          Pages of the longest known prefix, in order of their positions.
        """
        pages = []
        for key in self._keys(tokens):
            if key not in self._page_of:
                break
            pages.append(self._page_of[key])
        pages = pages[: len(pages) // unit * unit]
        for page in pages:
            self._users[page] += 1
            self._kept.pop(page, None)
        return pages

    def allocate(self, count: int) -> list[int] | None:
        """Assigns pages to one user each; returns None, and changes nothing, if fewer are available."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._users[page] = 1
            pages.append(page)
        return pages

    def register(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Remembers the pages of a text that full-precision prefills have written.

        A page whose prefix another page holds already is not remembered.

        Args:
          tokens: Tokens of the text from position 0 on.
          pages: Pages of the text, in order; those that ``tokens`` do not fill are not remembered.
        """
        for page, key in zip(pages, self._keys(tokens), strict=False):
            if key not in self._page_of and page not in self._key_of:
                self._page_of[key] = page
                self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Removes a user from each page of a text.

        Raises:
          ValueError: A page has no user.
        """
        for page in reversed(pages):  # The end of a text is evicted before its beginning.
            if self._users[page] == 0:
                raise ValueError(f"page {page} is released, but no request uses it; release each page once")
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def forget(self) -> None:
        """Forgets all prefixes, so that later requests read every token."""
        self._key_of.clear()
        self._page_of.clear()
        self._free += self._kept
        self._kept.clear()

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        self.evicted += 1
        del self._page_of[self._key_of.pop(page)]
        return page

    def _keys(self, tokens: Sequence[int]):
        """Yields a hash for each whole page of a text. It covers all tokens up to the end of the page."""
        key = b""
        for start in range(0, len(tokens) // self.page_size * self.page_size, self.page_size):
            page = np.asarray(tokens[start : start + self.page_size], np.int32)
            key = hashlib.sha256(key + page.tobytes()).digest()
            yield key
