"""Every error that jaxserve raises on purpose.

    JaxserveError
    ├── InvalidRequest      the caller asked for something that cannot be served
    │   ├── RequestTooLarge     it has more bytes than are taken
    │   └── UnsupportedMediaType    its body is in no form that is read
    ├── Unauthenticated     the caller brought no valid API key
    ├── PermissionDenied    the caller may not do this
    ├── Unsupported         a protocol has a call for this, and this server does not offer it
    ├── RateLimited         the tenant has used up its share; try again later
    ├── ModelNotFound       no model of that name is served (or can be found)
    ├── QueueFull           the waiting queue is at its limit; try again later
    ├── TargetMissed        the request was given up: it could not meet its target any more
    ├── RequestFailed       the request could not go on; others are not affected
    ├── StreamStalled       the client reads nothing of its answer
    ├── Draining            the server is shutting down and takes no new work
    ├── EngineDead          the engine loop has stopped; every request fails
    │   └── StepHung        a step does not end
    ├── ConfigError         an option, mesh or model configuration is wrong
    ├── CheckpointError     a checkpoint or tokenizer file is missing, corrupt or unsupported
    └── CompileAfterReady   a program was compiled after start-up had finished

A front end maps each class to one status of its protocol (gRPC: `server/status.py`).
"""


class JaxserveError(Exception):
    """Base of every deliberate error; its message is fit to show to a user.

    Attributes:
        exit_status: of a process that ends with it.
    """

    exit_status = 1


class InvalidRequest(JaxserveError, ValueError):
    """A request carries a parameter or a prompt that cannot be served.

    Attributes:
        param: the parameter at fault, where one is to blame.
    """

    def __init__(self, message: str = "", *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestTooLarge(InvalidRequest):
    """A request has more bytes than are taken."""


class UnsupportedMediaType(InvalidRequest):
    """A request's body is of a type, or encoded in a way, that is not read."""


class Unauthenticated(JaxserveError):
    """API keys are on, and the caller brought none that is known."""


class PermissionDenied(JaxserveError):
    """The caller is known but may not do this, such as act for another tenant."""


class Unsupported(JaxserveError):
    """A protocol defines this call, and the server does not offer it (or not as it runs now)."""


class RateLimited(JaxserveError):
    """The tenant has used up what it may ask for at a time.

    Attributes:
        retry_after: seconds after which it may try again, if that is known.
    """

    def __init__(self, message: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ModelNotFound(JaxserveError, LookupError):
    """The named model is not served here, or could not be found to load."""


class QueueFull(JaxserveError):
    """Too many requests are waiting; the caller should back off and retry."""


class TargetMissed(JaxserveError):
    """A waiting request could not meet its target any more; the caller should back off."""


class RequestFailed(JaxserveError):
    """One request could not go on for a reason of its own, after it had been taken."""


class StreamStalled(JaxserveError):
    """The client of a stream has read nothing for so long that it was cut off."""


class Draining(JaxserveError):
    """The server is draining: running requests finish, new ones are refused."""


class EngineDead(JaxserveError, RuntimeError):
    """The engine loop ended (its cause is chained); nothing more will be served."""

    exit_status = 70


class StepHung(EngineDead):
    """A step takes so much longer than those before that it is not expected to end."""

    exit_status = 71


class ConfigError(JaxserveError, ValueError):
    """An engine option, a mesh or a model configuration is wrong or impossible."""


class CheckpointError(JaxserveError):
    """A checkpoint or tokenizer is missing a part, corrupt, or of an unknown kind."""


class CompileAfterReady(JaxserveError, RuntimeError):
    """An XLA program was compiled after warm-up; shapes leaked past the buckets."""
