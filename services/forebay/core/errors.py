"""Every error that Forebay raises on purpose.

ForebayError
├── InvalidRequest            the client sent something that can never work; names the field
├── NotFound                  the named model (or request) does not exist
├── Overloaded                no capacity within the time allowed; carries when to come back
├── DeadlineExceeded          the request's one deadline has passed
├── RequestCancelled          the client left or aborted
├── Unavailable               a process that is needed is not there, or is draining
│   └── WorkerLost            a worker went away with the request on it
├── KvTransferError           KV bytes did not arrive whole, or for a lease nobody holds
├── ConfigurationError        settings, ports or options with which nothing can start
│   └── ModelFileError        no such model file, wrong checksum, unsupported architecture
└── InternalError             a broken invariant; always a bug

`forebay.rpc.status` maps them to HTTP and gRPC in one table.
"""

from __future__ import annotations


class ForebayError(Exception):
    """Base of the tree. `message` is fit to be shown to the caller."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(ForebayError):
    """`param` is the path of the offending field (`messages[0].role`); `code` a stable slug."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class NotFound(ForebayError):
    """`param` is the field that named the missing thing."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Overloaded(ForebayError):
    """`retry_after_s` is our honest guess of when capacity is back, in seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(ForebayError):
    pass


class RequestCancelled(ForebayError):
    pass


class Unavailable(ForebayError):
    pass


class WorkerLost(Unavailable):
    pass


class KvTransferError(ForebayError):
    pass


class ConfigurationError(ForebayError):
    pass


class ModelFileError(ConfigurationError):
    pass


class InternalError(ForebayError):
    pass
