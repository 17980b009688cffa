"""The exceptions that raysys raises for its users. Our own bugs are `AssertionError`s.

    RaysysError
    ├── Terminal                      will fail again: change something first
    │   ├── ConfigError               a config value is unknown, missing or out of bounds
    │   ├── RootError                 the root cannot be reached, read or written as configured
    │   ├── LedgerCorruptError        a record is missing, torn, changed, or may not be there
    │   ├── UnknownRecordError        the ledger has no record of that number
    │   ├── EmptyPlanError            there is nothing new to train on
    │   ├── PartitionChangedError     a partition is late, rewritten, vanished or empty
    │   ├── BudgetExhaustedError      the update would spend more privacy than is left
    │   ├── DataError                 no usable rows, or a column of the wrong kind
    │   ├── PrivacyError              a step would not have the guarantee that it reports
    │   ├── HealthError               training moved what it should not, or not what it should
    │   ├── TrialError                a trial failed, and with it the selection
    │   ├── ArtifactError             a version's file is missing or has another hash
    │   ├── VersionCheckError         a version did not pass its check, so no replica serves it
    │   ├── ReplayMismatchError       a replay came out differently
    │   ├── UnknownVersionError       no version of that name was committed
    │   └── TransitionError           the rollout cannot go from this phase to that one
    └── Transient                     may pass by itself: retry later
        ├── LeaseHeldError            another updater is at work
        ├── LeaseLostError            another updater took over after this one fell silent
        ├── WorkersLostError          train workers died more often than they are replaced
        ├── MissingKeyError           a replica has not got a pseudonym key yet that others use
        └── StorageUnavailableError   the object store did not answer in time

Every message names the value and says what to do. The jobs and the command line print it as one
line and exit with 1 (`Terminal`) or 75 (`Transient`, EX_TEMPFAIL of sysexits.h).
"""


class RaysysError(Exception):
    """Anything that raysys refuses or cannot do, with a one-line message for its user."""

    exit_code = 1


class Terminal(RaysysError):
    """Fails again on a retry: input, config or state must change first."""


class Transient(RaysysError):
    """May succeed on a retry."""

    exit_code = 75


class ConfigError(Terminal, ValueError):
    """A config value is unknown, missing or out of bounds."""


class RootError(Terminal):
    """The root cannot be reached, read or written as configured."""


class LedgerCorruptError(Terminal):
    """A ledger record is missing, torn, changed after it was written, or may not be there."""


class UnknownRecordError(Terminal):
    """The ledger has no record of that number."""


class EmptyPlanError(Terminal):
    """There is nothing new to train on."""


class PartitionChangedError(Terminal):
    """A partition got late files, was rewritten or vanished after an update consumed it, or holds
    no data, and the config says to fail then."""


class BudgetExhaustedError(Terminal):
    """The update would spend more privacy than is left."""


class DataError(Terminal, ValueError):
    """No usable rows, or a column of the wrong kind."""


class PrivacyError(Terminal):
    """A step would not have the guarantee that it reports."""


class HealthError(Terminal):
    """Training moved what it should not, or not what it should, or is written as another."""


class TrialError(Terminal):
    """A trial failed, and with it the selection: to drop it would be a choice by the data."""


class ArtifactError(Terminal):
    """A version's file is missing or has another hash than the ledger says."""


class VersionCheckError(Terminal):
    """A version did not pass its check in a process of its own, so no replica serves it."""


class ReplayMismatchError(Terminal):
    """A replay came out differently than the update that it replays."""


class UnknownVersionError(Terminal, KeyError):
    """No version of that name was committed."""

    __str__ = Exception.__str__


class TransitionError(Terminal):
    """The rollout cannot go from its phase to the one asked for."""


class LeaseHeldError(Transient):
    """Another updater is at work."""


class LeaseLostError(Transient):
    """Another updater took over after this one fell silent."""


class WorkersLostError(Transient):
    """Train workers died more often than they are replaced."""


class MissingKeyError(Transient):
    """A replica has not got a pseudonym key yet that others use."""


class StorageUnavailableError(Transient):
    """The object store did not answer in time."""
