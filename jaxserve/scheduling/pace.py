"""How fast steps are, as seen from their plans."""


class Pace:
    """How long a step takes, and a prompt token when the step is full of them.

    Wrong on the hopeful side: a request is called overdue only if it surely is. So small steps say
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
        """Work has run out: the time until the next step says nothing."""
        self._num_tokens = 0


def _blend(known: float, seconds: float) -> float:
    weight = 1.0 if not known else 0.3 if seconds < known else 0.05
    return known + weight * (seconds - known)
