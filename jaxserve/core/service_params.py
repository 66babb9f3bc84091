"""How a caller wants to be served beside others: who they are, how urgent, what they may share."""

import dataclasses
import math

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.plain_values import integer, number, string

MAX_NAME_CHARS = 256
MAX_PRIORITY = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceParams:
    """A request's place among the others; what it generates does not depend on it.

    Attributes:
        tenant: on whose account the request is served; fair policies share between tenants.
        priority: smaller is served first under the policy `priority`, as in vLLM.
        cache_salt: requests share cached KV pages only with those of the same salt.
        ttft_target: seconds from arrival in which the first token is wanted; None: no matter.
        tpot_target: seconds per token after the first that are wanted; None: no matter.
        traceparent: the caller's W3C trace context, under which the request's spans are put.

    Raises:
        InvalidRequest: a value is outside its range; the message names the field.
    """

    tenant: str = ""
    priority: int = 0
    cache_salt: str = ""
    ttft_target: float | None = None
    tpot_target: float | None = None
    traceparent: str = ""

    def __post_init__(self) -> None:
        for field in ("tenant", "cache_salt", "traceparent"):
            if len(string(field, getattr(self, field))) > MAX_NAME_CHARS:
                raise InvalidRequest(
                    f"{field} must have at most {MAX_NAME_CHARS} characters", param=field
                )
        object.__setattr__(self, "priority", integer("priority", self.priority))
        if abs(self.priority) > MAX_PRIORITY:
            raise InvalidRequest(
                f"priority must be an int32, got {self.priority}", param="priority"
            )
        for field in ("ttft_target", "tpot_target"):
            value = getattr(self, field)
            if value is not None:
                value = number(field, value)
                object.__setattr__(self, field, value)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidRequest(
                    f"{field} must be a positive number of seconds, got {value}", param=field
                )
