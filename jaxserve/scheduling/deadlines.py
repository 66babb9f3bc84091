"""When requests must be served to meet their targets, at the pace that steps were seen to have."""

from collections.abc import Sequence

from jaxserve.core.request import Request
from jaxserve.scheduling.pace import Pace


class _Book:
    """What is remembered of a request, in seconds."""

    __slots__ = ("first_token", "missed", "tpot_target", "ttft_deadline", "ttft_target")

    def __init__(self, request: Request, ttft_target: float, tpot_target: float) -> None:
        self.ttft_target = request.service.ttft_target or ttft_target
        self.ttft_deadline = request.arrival_time + self.ttft_target
        self.tpot_target = request.service.tpot_target or tpot_target
        self.first_token: float | None = None  # when it was expected as it was planned
        self.missed = 0.0  # or 1, if that was after the deadline


class Deadlines:
    """Each unfinished request's next deadline, and whether its TTFT target is lost.

    A request without a token has to start in time to compute its prompt by
    `arrival + ttft_target`; one with n tokens is due at `first token + n * tpot_target`. With
    prompts that take equally long, their order is earliest deadline first, otherwise least slack.

    Args:
        ttft_target, tpot_target: seconds, of requests that bring none of their own.
    """

    def __init__(self, ttft_target: float, tpot_target: float) -> None:
        self._targets = ttft_target, tpot_target
        self._books: dict[int, _Book] = {}  # by Request.key
        self._pace = Pace()

    def open(self, request: Request) -> None:
        """A new request waits."""
        self._books[request.key] = _Book(request, *self._targets)

    def ranks(self, requests: Sequence[Request], now: float) -> list[tuple[float, float]]:
        """Per request (1 if its TTFT target is lost or else 0, when it is due in seconds)."""
        books, ranks = self._books, []
        for request in requests:
            book = books[request.key]
            if book.first_token is None:
                due = self._prompt_due(request, book)
                ranks.append((1.0 if due < now else 0.0, due))
            else:
                answer = request.num_tokens - len(request.prompt_token_ids)
                ranks.append((book.missed, book.first_token + answer * book.tpot_target))
        return ranks

    def ttft_target(self, request: Request) -> float:
        """The request's target for its first token, in seconds."""
        return self._books[request.key].ttft_target

    def has_started(self, request: Request) -> bool:
        """Whether its first token was planned."""
        return self._books[request.key].first_token is not None

    def note(self, served: Sequence[tuple[Request, int]], now: float) -> None:
        """Note first tokens, and how long steps take; see `Policy.served`."""
        self._pace.step(sum(num_tokens for _, num_tokens in served), now)
        books = self._books
        for request, _ in served:
            book = books[request.key]
            if book.first_token is None and request.num_output_tokens:
                book.first_token = now + self._pace.seconds_per_step
                book.missed = float(book.first_token > book.ttft_deadline)

    def close(self, request: Request) -> None:
        """A request has ended: forget it."""
        self._books.pop(request.key, None)
        if not self._books:
            self._pace.idle()

    def _prompt_due(self, request: Request, book: _Book) -> float:
        """When the rest of a prompt must be begun for its first token to come in time."""
        computed, cached = request.num_computed_tokens, request.cached_estimate
        missing = len(request.prompt_token_ids) - (computed if computed > cached else cached)
        return book.ttft_deadline - self._pace.seconds_for(missing)
