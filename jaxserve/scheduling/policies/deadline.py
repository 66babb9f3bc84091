"""Least slack against the targets for the first token and for each token after it."""

from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Policy, PolicySettings, Priority


class LeastSlack(Policy):
    """Whoever must be served soonest to meet its target goes first.

    A request without a token has to start in time to compute its prompt by
    `arrival + ttft_target`; one with n tokens is due at `first token + n * tpot_target`. With
    equal prompts and cached parts this is earliest deadline first (Liu and Layland, 1973), and
    least slack otherwise.

    Deadlines alone collapse under overload: everybody is served a little too late. So a request
    that cannot meet its TTFT target any more comes after all that still can, until the
    starvation timeout, and with `shed_late` it is given up instead.

    To meet a TTFT target half of whose slack is used up, a request displaces a running one that
    is so far ahead of its own deadline that it can be away for a whole TTFT target, or one that
    is late and has no token yet. Whoever was displaced needs that long until it is in danger
    itself, so nobody is displaced at every turn (Andes, Liu et al., 2024, pauses streams that
    are ahead of their readers likewise).

    Args:
        settings: the targets of requests that bring none, and whether to shed.
    """

    reranks = True
    refreshes = True  # waiting requests turn late

    def __init__(self, settings: PolicySettings) -> None:
        self._ttft_target = settings.ttft_target
        self._tpot_target = settings.tpot_target
        self._shed_late = settings.shed_late
        self._first_tokens: dict[int, float | None] = {}  # by key: when it was planned
        self._pace = _Pace()

    def arrived(self, request: Request, now: float) -> None:
        """Open a request's book."""
        self._first_tokens[request.key] = None

    def priority(self, request: Request, now: float) -> Priority:
        """(1 if too late for its TTFT target or else 0, latest start in seconds)."""
        first_token = self._first_tokens[request.key]
        if first_token is None:
            start = self._latest_start(request)
            return (1.0 if start < now else 0.0, start)
        target = request.service.tpot_target or self._tpot_target
        answer = len(request.output_token_ids) + request.num_pending_tokens
        return (0.0, first_token + answer * target)

    def displaces(self, newcomer: Request, running: Request, now: float) -> bool:
        """Whether the newcomer is in danger and the running one is not, or is lost already."""
        target = newcomer.service.ttft_target or self._ttft_target
        if not 0.0 <= self._due(newcomer) - now < target / 2:
            return False
        slack = self._due(running) - now
        if self._first_tokens[running.key] is None:
            return slack < 0.0
        return slack > target

    def sheds(self, request: Request, now: float) -> bool:
        """Whether no token is there, and none can be there in time."""
        return (
            self._shed_late
            and self._first_tokens[request.key] is None
            and self._latest_start(request) < now
        )

    def served(self, request: Request, num_tokens: int, now: float) -> None:
        """Note the first token, and how long steps take."""
        self._pace.step(num_tokens, now)
        if self._first_tokens[request.key] is None and request.num_output_tokens:
            self._first_tokens[request.key] = now

    def finished(self, request: Request) -> None:
        """Forget the request."""
        self._first_tokens.pop(request.key, None)
        if not self._first_tokens:
            self._pace.idle()

    def _due(self, request: Request) -> float:
        first_token = self._first_tokens[request.key]
        if first_token is None:
            return self._latest_start(request)
        target = request.service.tpot_target or self._tpot_target
        return first_token + request.num_output_tokens * target

    def _latest_start(self, request: Request) -> float:
        """When the rest of the prompt must start to be computed, in seconds."""
        target = request.service.ttft_target or self._ttft_target
        done = max(request.num_computed_tokens, request.num_cached_tokens)
        missing = len(request.prompt_token_ids) - done
        return request.arrival_time + target - missing * self._pace.seconds_per_token


class _Pace:
    """How long a prompt token takes when the step is full of them.

    Wrong on the hopeful side: a request is called late only if it surely is. So small steps do
    not count, 0 is assumed until something was measured, and faster steps are believed sooner
    than slower ones, which may have waited for something else.
    """

    MIN_TOKENS = 64  # of a step that counts
    FASTER, SLOWER = 0.3, 0.05  # weight of a new measurement

    def __init__(self) -> None:
        self.seconds_per_token = 0.0
        self._started = 0.0
        self._num_tokens = 0

    def step(self, num_tokens: int, now: float) -> None:
        """Tokens were planned at that time; the plan of the next step ends this one's time."""
        if now != self._started:
            if self._num_tokens >= self.MIN_TOKENS:
                self._measured((now - self._started) / self._num_tokens)
            self._started = now
            self._num_tokens = 0
        self._num_tokens += num_tokens

    def idle(self) -> None:
        """Nothing is left to do: the time until the next step says nothing."""
        self._num_tokens = 0

    def _measured(self, seconds: float) -> None:
        known = self.seconds_per_token
        weight = 1.0 if not known else self.FASTER if seconds < known else self.SLOWER
        self.seconds_per_token += weight * (seconds - known)
