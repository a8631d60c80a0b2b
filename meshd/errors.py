"""One tree of errors.

Every error that may reach a person or a client derives from `MeshdError` and carries the three
facts its edge needs: `code` (the string in OpenAI's error object), `status` (HTTP) and `exit_code`
(CLI). The message says what happened, where, and what to do next. Raise at the edge that knows,
translate once per boundary, catch only to act.
"""

from __future__ import annotations

from typing import Any, ClassVar


class MeshdError(Exception):
    """Base of everything meshd says on purpose. Anything else that escapes is a bug."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        detail: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.detail = detail
        """Goes into `error.meshd`: machine-readable facts such as state, progress, reason."""


# -- requests -------------------------------------------------------------------------------------


class InvalidRequest(MeshdError):
    code, status, exit_code = "invalid_request", 400, 2


class Unauthorized(MeshdError):
    code, status = "unauthorized", 401


class HostNotAllowed(MeshdError):
    code, status = "host_not_allowed", 403


class NotFound(MeshdError):
    code, status = "not_found", 404


class MethodNotAllowed(MeshdError):
    code, status = "method_not_allowed", 405


class RequestTimeout(MeshdError):
    """The client was too slow in sending its request."""

    code, status = "request_timeout", 408


class RequestTooLarge(MeshdError):
    code, status = "request_too_large", 413


class UnsupportedEncoding(MeshdError):
    """The request body is compressed; its `model` could not be read without unpacking it."""

    code, status = "unsupported_encoding", 415


class ExpectationFailed(MeshdError):
    code, status = "expectation_failed", 417


class QueueFull(MeshdError):
    code, status, retryable = "queue_full", 429, True


class UpstreamFailed(MeshdError):
    code, status, retryable = "upstream_failed", 502, True


class UpstreamTimeout(MeshdError):
    code, status, retryable = "upstream_timeout", 504, True


class NodeDraining(MeshdError):
    code, status, retryable = "node_draining", 503, True


class TooManyConnections(MeshdError):
    code, status, retryable = "too_many_connections", 503, True


# -- models ---------------------------------------------------------------------------------------


class ModelNotFound(MeshdError):
    code, status = "model_not_found", 404


class ModelLoading(MeshdError):
    code, status, retryable = "model_loading", 503, True


class ModelFailed(MeshdError):
    code, status, retryable = "model_failed", 503, True


class SplitFailed(MeshdError):
    """The workers of a split model cannot be used now; the message names the one and says why.
    `workers`: ids of those it is about."""

    code, status, retryable = "split_failed", 503, True

    def __init__(self, message: str, *, workers: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.workers = workers


class BadReference(MeshdError):
    """A REF that cannot be read, or that names nothing on this machine."""

    code, status, exit_code = "invalid_reference", 400, 1


class BrokenWeights(MeshdError):
    """Weights that must not reach an engine. `path`: the file; the message: what is wrong."""

    code, status = "model_failed", 503

    def __init__(self, message: str, *, path: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s, detail={"path": path})
        self.path = path


class ModelAmbiguous(MeshdError):
    """A name that means different weights on different nodes; the message gives the exact names."""

    code, status = "model_ambiguous", 409


class HubRefused(MeshdError):
    """The hub said no and will say it again: no such repository, no access, no licence accepted."""

    code, status = "hub_refused", 502


class HubUnavailable(MeshdError):
    """The hub cannot be reached, is not to be reached (offline), or is ill for now."""

    code, status, retryable = "hub_unavailable", 503, True


class NotInCache(MeshdError):
    """A REF of which nothing is on this machine."""

    code, status = "not_in_cache", 404


class CacheUnwritable(MeshdError):
    """The disk under the weights refuses or fails; the message names the file and why."""

    code = "cache_unwritable"


class WeightsInUse(MeshdError):
    """Weights that cannot be removed now: an engine runs on them, or something else needs them."""

    code, status = "weights_in_use", 409


# -- engines --------------------------------------------------------------------------------------


class EngineMissing(MeshdError):
    """No usable llama-server on this machine."""

    code, status = "engine_missing", 503


class GpuRequired(MeshdError):
    """`--require-gpu`, and no device of the engine is proved; the message says what failed."""

    code, status, exit_code = "gpu_required", 503, 78


class EngineRejected(MeshdError):
    """A directory of binaries that was looked at and is not usable; the message says why."""

    code, status = "engine_rejected", 503


class BuildFailed(MeshdError):
    code = "build_failed"


class SourceRejected(BuildFailed):
    """The fetched engine source is not the pinned one."""

    code = "source_rejected"


class ToolMissing(BuildFailed):
    """A tool the build needs is absent; the message names the package that has it."""

    code = "tool_missing"


# -- meshes ---------------------------------------------------------------------------------------


class BadInvite(MeshdError):
    """A token that is none, is cut off, or is of another kind; a bad value of a flag, hence 78."""

    code, status, exit_code = "bad_invite", 400, 78


class JoinRefused(MeshdError):
    """A mesh will not admit this node and trying again would not help; the message says why."""

    code, status = "join_refused", 403


class PeerRefused(MeshdError):
    """A node will not talk to this one (version, mesh, deny list, copied identity). `reason` is
    its name on the wire."""

    code, status = "peer_refused", 403

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message, detail={"reason": reason})
        self.reason = reason


class PeerUnreachable(MeshdError):
    """No connection to another node, in time or at all."""

    code, status, retryable = "peer_unreachable", 502, True


class ProtocolError(MeshdError):
    """A peer sent what the protocol does not allow; its connection ends."""

    code, status = "protocol_error", 400


class NotIssuer(MeshdError):
    """Only a node that holds the mesh's key can do this; the message names one."""

    code, status = "not_issuer", 409


class NoMesh(MeshdError):
    """This node belongs to no mesh."""

    code, status = "no_mesh", 409


# -- the daemon itself ----------------------------------------------------------------------------


class BadConfig(MeshdError):
    """A flag, variable or key that cannot be used. Exit 78 (EX_CONFIG of sysexits.h)."""

    code, exit_code = "bad_config", 78


class DaemonNotRunning(MeshdError):
    code, exit_code = "daemon_not_running", 3


class AddressInUse(MeshdError):
    code = "address_in_use"


class DataDirectoryBusy(MeshdError):
    """Another daemon holds the lock of this data directory."""

    code = "data_directory_busy"


class NoSpace(MeshdError):
    code = "no_space"
