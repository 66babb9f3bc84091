"""Finding pages by what they hold: a whole page by its key, the start of one by its tokens."""

from collections.abc import ItemsView, Sequence

from jaxserve.cache.page_keys import token_bytes

# How many pages are compared with the tokens asked for. All prompts of a chat template begin
# alike, so the pages with one parent and first token may be thousands.
_MAX_CANDIDATES = 8
_END = -1  # of a list of siblings
_APART = -2  # in no list


class PrefixIndex:
    """Keys and tokens of the pages of one pool; O(1) for a page that comes or goes.

    Pages that begin alike (same parent, same first token) form a list, the latest first. The
    lists are linked through two arrays of page numbers, so that a page leaves its list without
    a search and a list costs no object of its own.

    Attributes:
        key_of: by page number, its key; None for a page that is not in the index.
        is_tail: by page number, whether it is not full.

    Args:
        num_pages: pages are numbered 0 .. num_pages-1.
    """

    def __init__(self, num_pages: int) -> None:
        self.key_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self.is_tail = bytearray(num_pages)
        self._start: list[tuple[bytes, int]] = [(b"", 0)] * num_pages  # parent, first token
        self._tokens = [b""] * num_pages  # as `token_bytes` makes them: a tenth of a list's size
        self._newest: dict[tuple[bytes, int], int] = {}  # by start: the head of its list
        self._older = [_APART] * num_pages
        self._newer = [_APART] * num_pages
        self._most_tokens = 0  # of any page so far

    def __len__(self) -> int:
        return len(self._page_of)

    def find(self, key: bytes) -> int | None:
        """The page of that key, full or tail."""
        return self._page_of.get(key)

    def items(self) -> ItemsView[bytes, int]:
        """All keys and their pages, in the order in which they came."""
        return self._page_of.items()

    def add(
        self, page: int, key: bytes, parent: bytes, tokens: Sequence[int], *, is_tail: bool
    ) -> None:
        """Let a page be found by its key, which must be new here; see `link` for its start."""
        self.key_of[page] = key
        self._page_of[key] = page
        self.is_tail[page] = is_tail
        self._start[page] = (parent, tokens[0])
        self._tokens[page] = token_bytes(tokens)
        if len(tokens) > self._most_tokens:
            self._most_tokens = len(tokens)

    def make_full(self, page: int) -> None:
        """Say that the tokens of a tail fill it: it may be shared like any full page."""
        self.is_tail[page] = False

    def link(self, page: int) -> None:
        """Let a page be found by its start too, unless it is already or has left the index."""
        if self._older[page] != _APART or self.key_of[page] is None:
            return
        start = self._start[page]
        second = self._newest.get(start, _END)
        self._older[page] = second
        self._newer[page] = _END
        self._newest[start] = page
        if second != _END:
            self._newer[second] = page

    def remove(self, page: int) -> bytes:
        """Forget a page that is in the index; returns its key."""
        key = self.key_of[page]
        assert key is not None
        self.key_of[page] = None
        del self._page_of[key]
        self._tokens[page] = b""
        older = self._older[page]
        if older != _APART:
            newer = self._newer[page]
            self._older[page] = self._newer[page] = _APART
            if older != _END:
                self._newer[older] = newer
            if newer != _END:
                self._older[newer] = older
            elif older != _END:
                self._newest[self._start[page]] = older
            else:
                del self._newest[self._start[page]]
        return key

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The full pages of the longest run of leading keys that are all here."""
        pages = []
        is_tail = self.is_tail
        for page in map(self._page_of.get, keys):
            if page is None or is_tail[page]:
                break
            pages.append(page)
        return pages

    def match_partial(self, parent: bytes, tokens: Sequence[int]) -> tuple[int, int] | None:
        """The page after `parent` with most leading tokens in common, and how many; or None.

        Only the latest few of the pages that have the first token in common are looked at. Of
        equals the latest is taken.
        """
        if not len(tokens):
            return None
        page = self._newest.get((parent, tokens[0]), _END)
        if page == _END:
            return None
        wanted = token_bytes(tokens[: self._most_tokens])
        best, most = page, 0
        for _ in range(_MAX_CANDIDATES):
            num_common = _num_common(wanted, self._tokens[page])
            if num_common > most:
                best, most = page, num_common
            page = self._older[page]
            if page == _END:
                break
        return best, most

    def check(self) -> None:
        """Verify the books; O(pages), for tests.

        Raises:
            AssertionError: keys and pages do not correspond, or a list is broken.
        """
        keyed = {page: key for page, key in enumerate(self.key_of) if key is not None}
        assert {key: page for page, key in keyed.items()} == self._page_of, "keys and pages differ"
        linked = set()
        for start, page in self._newest.items():
            newer = _END
            while page != _END:
                assert page not in linked, f"page {page} is in two lists"
                linked.add(page)
                assert self._newer[page] == newer, f"page {page} is not linked both ways"
                assert self._start[page] == start, f"page {page} is in another page's list"
                newer, page = page, self._older[page]
        apart = [page for page, older in enumerate(self._older) if older == _APART]
        assert linked.isdisjoint(apart), "a page is in a list and knows nothing of it"
        assert len(linked) + len(apart) == len(self.key_of), "a page is in no list"
        assert linked <= keyed.keys(), "a page without a key is in a list"


def _num_common(a: bytes, b: bytes) -> int:
    """Leading tokens that two rows of `token_bytes` have in common."""
    length = min(len(a), len(b))
    differing = int.from_bytes(a[:length], "little") ^ int.from_bytes(b[:length], "little")
    if not differing:
        return length // 4
    lowest_bit = (differing & -differing).bit_length() - 1  # the first token is the lowest int32
    return lowest_bit // 32
