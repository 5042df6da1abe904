"""Every error esperd raises: one root, flat, each with a code that crosses the wire and an exit status for the CLI.

A message says what was wrong, with which value, and what to do about it. ``fields`` carries the same facts for programs.
"""

from __future__ import annotations

from typing import Any, ClassVar

WireValue = str | int | float | bool | None | list[str]


class EsperError(Exception):
    """Root of every error that esperd raises on purpose.

    Args:
        message: what was wrong, with which value, and what to do.
        **fields: the same facts as plain values; they travel with the error to a client.
    """

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, **fields: WireValue) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (error_from_code, (self.code, self.message, self.fields))


class ConfigError(EsperError):
    """esperd.toml, an ``ESPERD__SECTION__KEY`` variable or a command-line value is wrong; names key and place."""

    code = "invalid_config"
    exit_status = 2


class InvalidJob(EsperError):
    """A job is malformed, mistyped or asks for something impossible; names key and place."""

    code = "invalid_job"
    exit_status = 2


class UnknownName(EsperError):
    """A name that nothing registered: host, data set, blueprint, strategy, slot pattern; lists what exists."""

    code = "unknown_name"
    exit_status = 2


class ImportFailed(EsperError):
    """A ``module:function`` reference could not be imported or called; carries the traceback."""

    code = "import_failed"
    exit_status = 2


class InvalidData(EsperError):
    """Data that cannot be trained on: empty or overlapping splits, NaN, labels out of range, wrong shapes."""

    code = "invalid_data"
    exit_status = 2


class InvalidModel(EsperError):
    """A model that cannot be trained as asked: not a module, no parameters, or an output that does not fit the loss."""

    code = "invalid_model"
    exit_status = 2


class InvalidOptimizer(EsperError):
    """An optimiser that cannot be carried through growth: state kept by no parameter or group, no new groups, a closure."""

    code = "invalid_optimizer"
    exit_status = 2


class NotTraining(EsperError):
    """A training step or a structural change was asked of a network in eval mode."""

    code = "not_training"
    exit_status = 5


class InvalidSlot(EsperError):
    """A slot whose tensor cannot carry a seed: tuple output, changing shape, a topology no blueprint serves."""

    code = "invalid_slot"
    exit_status = 2


class BlueprintRejected(EsperError):
    """A blueprint breaks its contract: shape changed, not identity at alpha 0, no gradient, wrong formula."""

    code = "blueprint_rejected"


class KernelRejected(EsperError):
    """A kernel that may not run: unknown operation, malformed graph, hash or seal mismatch, failed self-test."""

    code = "kernel_rejected"


class CompileUnavailable(EsperError):
    """``torch.compile`` does not work on this machine: no C++ compiler, no such backend; says what was missing."""

    code = "compile_unavailable"
    exit_status = 2


class IllegalTransition(EsperError):
    """A seed or job was asked to move to a state its table does not allow from where it is."""

    code = "illegal_transition"
    exit_status = 5


class TrainingDiverged(EsperError):
    """The loss of the network became NaN or infinite; names epoch and step."""

    code = "training_diverged"


class RanksDisagree(EsperError):
    """Processes that grow one network came to different values, or to different points; names both."""

    code = "ranks_disagree"


class RankFailed(EsperError):
    """Another of the processes that grow one network raised, names it and its error; or one is not heard of any more."""

    code = "rank_failed"


class CheckpointRejected(EsperError):
    """A checkpoint that cannot be resumed from: another format version, or content that contradicts the job."""

    code = "checkpoint_rejected"


class ExportRejected(EsperError):
    """An export that cannot be written or loaded: unknown format, missing host, a form that answers unlike the network."""

    code = "export_rejected"
    exit_status = 2


class JobNotFound(EsperError):
    """No job has this id."""

    code = "job_not_found"
    exit_status = 4


class NothingToShow(EsperError):
    """The job exists but has not produced what was asked for yet (a report, an export)."""

    code = "nothing_to_show"
    exit_status = 4


class Conflict(EsperError):
    """The same idempotency key was used with another payload, or a stale lease tried to write."""

    code = "conflict"
    exit_status = 5


class Busy(EsperError):
    """The daemon is at a limit; ``retry_after_s`` says when to try again."""

    code = "busy"
    exit_status = 5


class ReadOnly(EsperError):
    """The disk is full or nearly so: new work is refused, nothing acknowledged is lost; ``retry_after_s``: when to try again."""

    code = "read_only"
    exit_status = 5


class CircuitOpen(EsperError):
    """A service failed so often in a row that it is left alone for a while; ``retry_after_s`` says how long."""

    code = "circuit_open"
    exit_status = 5


class JobFailed(EsperError):
    """A job that a command waited for did not succeed; carries the job's own error."""

    code = "job_failed"


class StateDirectoryLocked(EsperError):
    """Another live daemon owns this state directory; names its process id."""

    code = "state_directory_locked"
    exit_status = 5


class StateDirectoryUnusable(EsperError):
    """The state or runtime directory cannot be created, written, or is too long for a socket path."""

    code = "state_directory_unusable"
    exit_status = 2


class StoreFailed(EsperError):
    """The database or the blob store refused an operation, or holds content whose hash does not match."""

    code = "store_failed"


class AddressUnavailable(EsperError):
    """An address of the daemon cannot be listened on now: another program has it, or no interface that is up. That may pass."""

    code = "address_unavailable"


class DaemonUnreachable(EsperError):
    """No daemon answers at this endpoint; says how to start one."""

    code = "daemon_unreachable"
    exit_status = 3


class ProtocolMismatch(EsperError):
    """Client and daemon speak different protocol versions; names both and which side to upgrade."""

    code = "protocol_mismatch"
    exit_status = 3


class AuthenticationFailed(EsperError):
    """The daemon refuses this client's key, has another key than the one named, or wants one; says what to do."""

    code = "authentication_failed"
    exit_status = 3


class NotAllowed(EsperError):
    """A job names a module, an interpreter or a directory outside of what the daemon's configuration allows."""

    code = "not_allowed"
    exit_status = 2


class MalformedMessage(EsperError):
    """A frame that is not a message of this protocol."""

    code = "malformed_message"


class ActorUnavailable(EsperError):
    """No such actor, it stopped, or it is between two incarnations."""

    code = "actor_unavailable"


class AskTimeout(EsperError):
    """An actor did not answer within the time given."""

    code = "ask_timeout"


class HandlerFailed(EsperError):
    """An actor's handler raised while answering; carries the exception's type and text."""

    code = "handler_failed"


class WorkerFailed(EsperError):
    """A worker process could not be started or died: names command, exit status and the end of its output."""

    code = "worker_failed"


class OutOfMemory(EsperError):
    """A worker had no memory left, or took more than its job may; says how much, and what makes it need less."""

    code = "out_of_memory"


class NeverFits(EsperError):
    """A job takes more memory or cores than jobs may use on this machine; says of what, how much, and how much there is."""

    code = "never_fits"
    exit_status = 2


class MissingExtra(EsperError):
    """An optional dependency is absent; names the extra that installs it."""

    code = "missing_extra"
    exit_status = 2


def _subclasses() -> dict[str, type[EsperError]]:
    known: list[type[EsperError]] = [EsperError, *EsperError.__subclasses__()]
    return {error.code: error for error in known}


def error_from_code(code: str, message: str, fields: dict[str, WireValue] | None = None) -> EsperError:
    """Rebuild an error from what crossed a wire; an unknown code becomes the root error, with the code in its fields."""
    known = _subclasses().get(code)
    if known is None:
        return EsperError(message, **{**(fields or {}), "code": code})
    return known(message, **(fields or {}))
