"""Every error that curvd raises on purpose.

    CurvdError
    ├── InvalidArgument         your call is wrong; the message says how to mend it
    │   ├── InvalidVector           an operand's shape, dtype or values
    │   ├── InvalidTensors          bytes that are not the safetensors file they claim to be
    │   ├── StateMismatch           a model state whose tensors do not fit, or are not finite
    │   ├── InvalidGraph            a model or loss that cannot be written or run as a graph
    │   ├── GradientMismatch        a module or loss whose gradient is not that of its graph
    │   └── InvalidSpec             an option of a model, dataset, loss, session or operator
    ├── NotFound                the name refers to nothing on this server
    │   ├── ModelNotFound · DatasetNotFound · SessionNotFound · BuilderNotFound
    │   ├── CheckpointNotFound      no checkpoint of this name lies on the server
    │   ├── VectorNotFound          a session stores no vector of this name
    │   └── ResultNotKept           a result to go on with is not kept any more
    ├── FailedPrecondition      the call is right, the state of things is not
    │   ├── CannotConnect           target, TLS or certificates are not as configured
    │   ├── VersionMismatch         the session holds another parameter version
    │   ├── CurvatureUnverified     no AD mode reproduces finite differences
    │   ├── NotDeterministic        two evaluations of the same objective disagree
    │   ├── NotFinite               a product is NaN or infinite
    │   ├── ScaleOutOfRange         squares of a query's products leave their type
    │   └── StillInUse              a session still needs what was to be deleted
    ├── RequestIdReused         the same request id came with other content
    ├── ResourceExhausted       a limit was reached; the message names it
    │   ├── LimitExceeded           larger than the server accepts: retrying cannot help
    │   ├── Overloaded              the queue is full: retry after ``retry_after_s``
    │   ├── OutOfMemory             it does not fit the device, even in the smallest pieces
    │   └── DiskFull                the server's disk takes no more
    ├── DataLoss                stored bytes were damaged; the message says what is lost
    ├── Unauthenticated · PermissionDenied
    ├── Cancelled · DeadlineExceeded
    ├── Unavailable             no server, or one that is draining: safe to retry
    ├── Unimplemented           this server does not offer the call
    └── Internal                a defect of curvd: please report it

Each class carries the canonical gRPC status it travels as (``code``) and the machine
readable ``reason`` of its ``google.rpc.ErrorInfo``. `BY_REASON` and `BY_CODE` are the
one table between exceptions and status codes; server and client both read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

DOMAIN = "curvd"
"""``ErrorInfo.domain`` of every error in this module."""


def missing(*, what: str, module: str, extra: str) -> ModuleNotFoundError:
    """Say how to get a package that the base install does not bring.

    Args:
        what: What needs it, as the beginning of a sentence.
        module: The package that is not installed.
        extra: The extra of curvd that brings it; the README has the command.

    Returns:
        The exception to raise.
    """
    msg = f"{what} needs {module}: {install(extra)}"
    return ModuleNotFoundError(msg, name=module)


def install(extra: str) -> str:
    """Say how to install an extra, as the README does, from a checkout.

    Args:
        extra: Its name.

    Returns:
        The command.
    """
    return f"pip install -c constraints.txt '.[{extra}]' in a checkout of curvd"


class CurvdError(Exception):
    """Root of everything curvd raises on purpose.

    Args:
        message: What is wrong, with the value, the limit and the remedy.
        retry_after_s: When a retry may succeed, if the server knows.
        **values: The values in the message, for programs; sent as ErrorInfo metadata.

    Attributes:
        code: Name of the gRPC status this error travels as.
        reason: Machine readable reason, UPPER_SNAKE_CASE, unique to the class.
        metadata: The values as strings.

    Examples:
        >>> try:
        ...     session.hessian() @ np.ones(44)
        ... except curvd.InvalidVector as error:
        ...     print(error)
        ...     print(error.code, error.reason)
        the vector has shape [44]; expected [43] or [43, K]
        INVALID_ARGUMENT INVALID_VECTOR
    """

    code: ClassVar[str] = "UNKNOWN"
    reason: ClassVar[str] = "CURVD_ERROR"

    def __init_subclass__(cls, *, code: str | None = None) -> None:
        """Derive the reason from the class name and inherit or set the code."""
        super().__init_subclass__()
        if code is not None:
            cls.code = code
        cls.reason = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).upper()

    def __init__(
        self, message: str = "", *, retry_after_s: float | None = None, **values: object
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.metadata: Mapping[str, str] = {k: str(v) for k, v in values.items()}


class InvalidArgument(CurvdError, code="INVALID_ARGUMENT"):
    """The call is wrong whatever the state of the server."""


class InvalidVector(InvalidArgument):
    """An operand has the wrong shape or dtype, or is not finite."""


class InvalidTensors(InvalidArgument):
    """Bytes that are not the safetensors file they claim to be."""


class StateMismatch(InvalidArgument):
    """A model state has missing, extra, misshapen or not finite tensors; all are named."""


class InvalidGraph(InvalidArgument):
    """A model or loss cannot be written, or run, as a graph of allowed operators."""


class GradientMismatch(InvalidArgument):
    """What ``.backward()`` computes is not the derivative of what was exported."""


class InvalidSpec(InvalidArgument):
    """An option of a model, dataset, loss, session or operator is out of range."""


class NotFound(CurvdError, code="NOT_FOUND"):
    """The name refers to nothing on this server."""


class ModelNotFound(NotFound):
    """No such model is registered."""


class DatasetNotFound(NotFound):
    """No such dataset is registered."""


class CheckpointNotFound(NotFound):
    """No checkpoint of this name lies in the server's checkpoints_root."""


class SessionNotFound(NotFound):
    """No such session: it was never created, was deleted, or its lease ran out."""


class BuilderNotFound(NotFound):
    """The server's operator has not allowed a builder of this name."""


class VectorNotFound(NotFound):
    """The session stores no vector of this name; a restart of the server loses them."""


class ResultNotKept(NotFound):
    """The result to go on with is not kept any more: send the operand again."""


class FailedPrecondition(CurvdError, code="FAILED_PRECONDITION"):
    """The call is right, the state of things is not."""


class CannotConnect(FailedPrecondition):
    """Target, TLS or the server's certificate are not as this client was told."""


class VersionMismatch(FailedPrecondition):
    """The session holds another parameter version than the caller requires."""


class CurvatureUnverified(FailedPrecondition):
    """No AD mode reproduces finite differences; the disagreeing parameters are named."""


class NotDeterministic(FailedPrecondition):
    """Two evaluations of the same objective disagree, so no operator is defined."""


class NotFinite(FailedPrecondition):
    """A gradient or product is NaN or infinite: it is not defined there, or overflows."""


class ScaleOutOfRange(FailedPrecondition):
    """What a query computes is so large or small that its squares leave their type."""


class StillInUse(FailedPrecondition):
    """A session still needs what was to be deleted."""


class RequestIdReused(CurvdError, code="ALREADY_EXISTS"):
    """The same request id came with other content."""


class ResourceExhausted(CurvdError, code="RESOURCE_EXHAUSTED"):
    """A limit was reached."""


class LimitExceeded(ResourceExhausted):
    """Larger than this server accepts; retrying cannot help."""


class Overloaded(ResourceExhausted):
    """The queue is full; retry after `retry_after_s`."""


class OutOfMemory(ResourceExhausted):
    """It does not fit the device, or its verification does not fit the host."""


class DiskFull(ResourceExhausted):
    """The server's disk takes no more; nothing that was acknowledged is lost."""


class DataLoss(CurvdError, code="DATA_LOSS"):
    """Stored bytes were damaged; registering the same content again heals it."""


class Unauthenticated(CurvdError, code="UNAUTHENTICATED"):
    """The call carries no credentials, or wrong ones."""


class PermissionDenied(CurvdError, code="PERMISSION_DENIED"):
    """The caller may not touch this resource."""


class Cancelled(CurvdError, code="CANCELLED"):
    """The caller gave up, or the session was deleted while the call ran."""


class DeadlineExceeded(CurvdError, code="DEADLINE_EXCEEDED"):
    """The caller's deadline passed."""


class Unavailable(CurvdError, code="UNAVAILABLE"):
    """No server answers, or it is draining; every curvd call may be retried."""


class Unimplemented(CurvdError, code="UNIMPLEMENTED"):
    """This server does not offer the call."""


class Internal(CurvdError, code="INTERNAL"):
    """A defect of curvd."""


def _tree(root: type[CurvdError]) -> list[type[CurvdError]]:
    return [root, *(c for sub in root.__subclasses__() for c in _tree(sub))]


BY_REASON: Mapping[str, type[CurvdError]] = {c.reason: c for c in _tree(CurvdError)}
"""ErrorInfo reason -> exception class, for errors that come from a curvd server."""

BY_CODE: Mapping[str, type[CurvdError]] = {
    c.code: c for c in reversed(_tree(CurvdError)) if c.__base__ is CurvdError
}
"""Status code -> the general class, for statuses that gRPC itself produces."""

__all__ = ["BY_CODE", "BY_REASON", "DOMAIN", *(c.__name__ for c in BY_REASON.values())]
