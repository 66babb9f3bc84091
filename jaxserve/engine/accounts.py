"""What an engine tells, and asks, the front end that counts what tenants use."""

from typing import Protocol


class Account(Protocol):
    """Where one request's use is written down."""

    def spend(self, num_tokens: int) -> None:
        """So many tokens of its answer came."""

    def leave(self) -> None:
        """It has ended, however it did; called once."""


class Accounts(Protocol):
    """Decides whether a tenant may have another request run."""

    def enter(self, tenant: str, num_prompt_tokens: int) -> Account | None:
        """Let a request in; None if its use is not counted.

        Raises:
            RateLimited: its tenant has used up its share.
        """
