"""Least slack against the targets for the first token and for each token after it."""

from collections.abc import Sequence

from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Policy, PolicySettings


class _Book:
    """What is remembered of a request, in seconds."""

    __slots__ = ("first_token", "tpot_target", "ttft_deadline", "ttft_target", "was_late")

    def __init__(self, request: Request, settings: PolicySettings) -> None:
        service = request.service
        self.ttft_target = service.ttft_target or settings.ttft_target
        self.ttft_deadline = request.arrival_time + self.ttft_target
        self.tpot_target = service.tpot_target or settings.tpot_target
        self.first_token: float | None = None  # when it was expected as it was planned
        self.was_late = 0.0  # or 1: its first place in the order


class LeastSlack(Policy):
    """Whoever must be served soonest to meet its target goes first.

    A request without a token has to start in time to compute its prompt by
    `arrival + ttft_target`; one with n tokens is due at `first token + n * tpot_target`. With
    prompts that take equally long this is earliest deadline first, otherwise least slack.

    Deadlines alone collapse under overload: everybody is served a little too late. So a request
    that misses its TTFT target, and with it its service level objective, comes after all that
    still can make it, until the starvation timeout. With `shed_late` it is given up instead, if
    it has no token yet.

    A request that is due within half its TTFT target displaces a running one that missed its own,
    or that is so far ahead of its deadline that it can be away for a whole TTFT target (Andes,
    Liu et al., 2024, likewise pauses streams that are ahead of their readers). It takes the
    displaced one half that time to be in danger itself, so nobody is displaced at every turn.

    Args:
        settings: the targets of requests that bring none, and whether to shed.
    """

    reranks = True
    refreshes = True  # waiting requests turn late

    def __init__(self, settings: PolicySettings) -> None:
        self._settings = settings
        self._books: dict[int, _Book] = {}  # by Request.key
        self._pace = _Pace()

    def arrived(self, request: Request, now: float) -> None:
        """Open a request's book."""
        self._books[request.key] = _Book(request, self._settings)

    def priority(self, request: Request, now: float) -> tuple[float, float]:
        """(1 if late for its TTFT target or else 0, when it is due to be served in seconds)."""
        return self.priorities([request], now)[0]

    def priorities(self, requests: Sequence[Request], now: float) -> Sequence[tuple[float, float]]:
        """See `Policy.priorities`."""
        books, ranks = self._books, []
        for request in requests:
            book = books[request.key]
            if book.first_token is None:
                due = self._prompt_due(request, book)
                ranks.append((1.0 if due < now else 0.0, due))
            else:
                answer = request.num_tokens - len(request.prompt_token_ids)
                ranks.append((book.was_late, book.first_token + answer * book.tpot_target))
        return ranks

    def displaces(self, newcomer: Request, running: Request, now: float) -> bool:
        """Whether the newcomer is in danger, and the running one is lost or far from it."""
        book = self._books[newcomer.key]
        late, due = self.priority(newcomer, now)
        if late or due - now > book.ttft_target / 2:
            return False
        late, due = self.priority(running, now)
        return bool(late) or (
            self._books[running.key].first_token is not None and due - now > book.ttft_target
        )

    def sheds(self, request: Request, now: float) -> bool:
        """Whether no token is there, and none can be there in time."""
        book = self._books[request.key]
        if not self._settings.shed_late or book.first_token is not None:
            return False
        return self._prompt_due(request, book) < now

    def served(self, served: Sequence[tuple[Request, int]], now: float) -> None:
        """Note first tokens, and how long steps take."""
        self._pace.step(sum(num_tokens for _, num_tokens in served), now)
        books = self._books
        for request, _ in served:
            book = books[request.key]
            if book.first_token is None and request.num_output_tokens:
                book.first_token = now + self._pace.seconds_per_step
                book.was_late = float(book.first_token > book.ttft_deadline)

    def finished(self, request: Request) -> None:
        """Forget the request."""
        self._books.pop(request.key, None)
        if not self._books:
            self._pace.idle()

    def _prompt_due(self, request: Request, book: _Book) -> float:
        """When the rest of a prompt must be begun for its first token to come in time."""
        computed, cached = request.num_computed_tokens, request.num_cached_tokens
        missing = len(request.prompt_token_ids) - (computed if computed > cached else cached)
        return book.ttft_deadline - self._pace.seconds_for(missing)


class _Pace:
    """How long a step takes, and a prompt token when the step is full of them.

    Wrong on the hopeful side: a request is called late only if it surely is. So small steps say
    nothing about tokens, 0 is assumed until something was measured, and what was faster than
    expected is believed sooner than what was slower and may have waited for something else.
    """

    MIN_TOKENS = 64  # of a step that says what a token takes

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self.seconds_per_token = 0.0
        self._started = 0.0
        self._num_tokens = 0

    def step(self, num_tokens: int, now: float) -> None:
        """Tokens were planned at that time; the plan of the next step ends this one's time."""
        if now != self._started:
            if self._num_tokens:
                seconds = now - self._started
                self.seconds_per_step = _blend(self.seconds_per_step, seconds)
                if self._num_tokens >= self.MIN_TOKENS:
                    per_token = seconds / self._num_tokens
                    self.seconds_per_token = _blend(self.seconds_per_token, per_token)
            self._started = now
            self._num_tokens = 0
        self._num_tokens += num_tokens

    def seconds_for(self, num_tokens: int) -> float:
        """How long so many prompt tokens take, in one step at least."""
        seconds = num_tokens * self.seconds_per_token
        return seconds if seconds > self.seconds_per_step else self.seconds_per_step

    def idle(self) -> None:
        """Nothing is left to do: the time until the next step says nothing."""
        self._num_tokens = 0


def _blend(known: float, seconds: float) -> float:
    weight = 1.0 if not known else 0.3 if seconds < known else 0.05
    return known + weight * (seconds - known)
