"""Who owns which page of the KV cache, and which pages hold a known prefix. Plain Python, no tensors.

A page is in exactly one state:

    state        references   in the free queue   has a key
    free         0            yes                 no
    cached       0            yes (evictable)     yes: its content can be found by prefix
    owned        1 or more    no                  if full and shareable

The prefix cache is a trie, not a table of hashes: a full page's key is (identity of the page content before it,
its own tokens), so equal keys mean equal contents all the way down to the root, which is the tier's digest.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

PageKey = tuple[Hashable, tuple[int, ...]]


@dataclass(frozen=True)
class _CachedPage:
    page: int
    content: int  # unique identity of this content; the parent part of its successors' keys


class BlockManager:
    """Allocates `num_pages` pages of `page_size` tokens; reference counts and finds shared prefixes."""

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self._references = [0] * num_pages
        # Least recently freed first: the order in which pages are taken, cached content dying last.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._by_key: dict[PageKey, _CachedPage] = {}
        self._key_of: dict[int, PageKey] = {}
        self._next_content = 0

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now, cached but unreferenced ones included."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of pages that some request owns, 0 to 1."""
        return 1.0 - len(self._free) / self.num_pages

    def num_needed(self, num_tokens: int, num_owned: int) -> int:
        """Pages missing to hold `num_tokens` tokens when `num_owned` pages are there."""
        return max(0, -(-num_tokens // self.page_size) - num_owned)

    def grow(self, pages: list[int], num_tokens: int) -> bool:
        """Appends fresh pages until `pages` holds `num_tokens` tokens. False, and no change, if too few are free."""
        missing = self.num_needed(num_tokens, len(pages))
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page, _ = self._free.popitem(last=False)
            self._forget(page)
            self._references[page] = 1
            pages.append(page)
        return True

    def match_prefix(self, root: Hashable, tokens: Sequence[int]) -> list[int]:
        """The cached pages that hold the longest known prefix of `tokens`, without taking a reference.

        At least the last token is left out, because only computing it gives logits to go on from.
        """
        pages: list[int] = []
        parent = root
        if not self.enable_prefix_caching:
            return pages
        for start in range(0, len(tokens) - self.page_size, self.page_size):
            cached = self._by_key.get((parent, tuple(tokens[start : start + self.page_size])))
            if cached is None:
                break
            pages.append(cached.page)
            parent = cached.content
        return pages

    def num_free_without(self, pages: Iterable[int]) -> int:
        """Pages left to allocate once `pages` (from match_prefix) are taken."""
        return len(self._free) - sum(self._references[page] == 0 for page in pages)

    def take(self, pages: Iterable[int]) -> None:
        """Adds a reference to each page (from match_prefix)."""
        for page in pages:
            if self._references[page] == 0:
                del self._free[page]
            self._references[page] += 1

    def register(
        self,
        root: Hashable,
        tokens: Sequence[int],
        pages: Sequence[int],
        num_registered: int,
        parent: Hashable,
    ) -> tuple[int, Hashable]:
        """Makes the full pages of computed `tokens` findable, from page `num_registered` on.

        parent: what the previous call returned for this request, or `root` before the first.
        Returns how many pages are registered now and the identity of the last one's content.
        """
        if not self.enable_prefix_caching:
            return num_registered, parent
        for index in range(num_registered, len(tokens) // self.page_size):
            start = index * self.page_size
            key = (parent, tuple(tokens[start : start + self.page_size]))
            cached = self._by_key.get(key)
            if cached is None:
                page = pages[index]
                # A fork's page may have a key under content that was given away since: nothing leads there any more.
                known = self._forget(page)
                cached = _CachedPage(page, self._next_content if known is None else known.content)
                self._next_content += 1
                self._by_key[key] = cached
                self._key_of[page] = key
            parent = cached.content
            num_registered = index + 1
        return num_registered, parent

    def free(self, pages: list[int]) -> None:
        """Drops one reference from each page and empties the list; the last page becomes evictable first."""
        for page in reversed(pages):
            assert self._references[page] > 0, f"page {page} freed twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free[page] = None
                if page not in self._key_of:  # nothing to keep: use it before any cached page
                    self._free.move_to_end(page, last=False)
        pages.clear()

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Asserts that references, free queue and prefix index agree with the page lists of all live requests."""
        counts = Counter(page for pages in owners for page in pages)
        for page in range(self.num_pages):
            assert self._references[page] == counts[page], (
                f"page {page}: {self._references[page]} != {counts[page]}"
            )
            assert (page in self._free) == (counts[page] == 0), f"page {page}: free queue disagrees"
        assert len(self._by_key) == len(self._key_of), "prefix index sizes differ"
        for page, key in self._key_of.items():
            assert self._by_key[key].page == page, f"page {page}: prefix index disagrees"

    def _forget(self, page: int) -> _CachedPage | None:
        key = self._key_of.pop(page, None)
        return None if key is None else self._by_key.pop(key)
