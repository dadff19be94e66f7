"""What a finished command tells its caller: one exit code for every error of the tree. Knows no command.

Scripts rely on these numbers: a code never changes its meaning, and a new error gets one of them.
"""

from __future__ import annotations

from lunashm import errors


class Refused(errors.LunashmError):
    """The command would touch what is not lunashm's."""

    code = "refused"


OK, ERROR, USAGE, NO_HOST, NOT_FOUND, REFUSED, NO_MEMORY, SERVING, TIMEOUT = range(9)
INTERRUPTED = 130
"""What shells report for Ctrl-C: 128 + SIGINT."""

MEANINGS: dict[int, str] = {
    OK: "done",
    ERROR: "any other error",
    USAGE: "wrong usage, or a setting makes no sense",
    NO_HOST: "no host is running there",
    NOT_FOUND: "no such model or file",
    REFUSED: "refused: in use, path not allowed, unsupported format, invalid file",
    NO_MEMORY: "not enough shared memory",
    SERVING: "another process serves this device already",
    TIMEOUT: "not done in time",
    INTERRUPTED: "interrupted with Ctrl-C",
}

CODES: dict[type[errors.LunashmError], int] = {
    errors.LunashmError: ERROR,
    errors.SettingsError: USAGE,
    errors.HostError: ERROR,
    errors.HostUnavailable: NO_HOST,
    errors.HostLost: NO_HOST,
    errors.HostTimeout: TIMEOUT,
    errors.AlreadyServing: SERVING,
    errors.ProtocolError: ERROR,
    errors.ProtocolMismatch: ERROR,
    errors.MalformedMessage: ERROR,
    errors.MessageTooLarge: ERROR,
    errors.NotRegistered: ERROR,
    errors.TicketRefused: ERROR,
    errors.ModelError: ERROR,
    errors.ModelNotFound: NOT_FOUND,
    errors.ModelInUse: REFUSED,
    errors.ModelNotReady: TIMEOUT,
    errors.LoadTimeout: TIMEOUT,
    errors.LoadCancelled: ERROR,
    errors.PathNotAllowed: REFUSED,
    errors.UnsupportedFormat: REFUSED,
    errors.InvalidCheckpoint: REFUSED,
    errors.SourceChanged: REFUSED,
    errors.LoraError: ERROR,
    errors.InvalidLora: REFUSED,
    errors.UnsupportedLora: REFUSED,
    errors.LoraMismatch: REFUSED,
    errors.SharedMemoryError: ERROR,
    errors.OutOfSharedMemory: NO_MEMORY,
    errors.SegmentFrozen: ERROR,
    errors.SegmentNotFrozen: ERROR,
    errors.SegmentGone: ERROR,
    errors.WrongDevice: ERROR,
    errors.LeaseError: ERROR,
    errors.LeaseUnknown: ERROR,
    errors.ForkedProcess: ERROR,
    Refused: REFUSED,
}


def code_of(error: errors.LunashmError) -> int:
    """The exit code of ``error``; of its nearest known ancestor for a class from elsewhere."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def table() -> str:
    """The codes, one a line, for ``lunashm --help``."""
    return "\n".join(["Exit codes:", *(f"{code:>5}  {meaning}" for code, meaning in MEANINGS.items())])
