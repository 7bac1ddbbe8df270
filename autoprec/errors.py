"""Every error a user can cause, and what the command line does with it.

All are an AutoprecError: exit status 2, and one line with the rule, what came, and the way out.
"""


class AutoprecError(Exception):
    """Root of the errors that autoprec raises on purpose; `str(error)` is one line."""


class SettingsError(AutoprecError):
    """An option of the command line, or an argument in Python, has a wrong value."""


class WorkloadError(AutoprecError):
    """A function of the user's model.py breaks the contract of a workload."""


class CaptureError(AutoprecError):
    """One real training step did not give a usable model spec."""


class RecordError(AutoprecError):
    """A record file is missing, truncated, edited wrongly, from elsewhere or not writable."""


class NoRoomError(RecordError):
    """A disk is full, or a quota used up; what was there before is as it was."""


class PlanMismatchError(AutoprecError):
    """A plan does not fit the model, the optimizer or the device."""


class DeviceError(AutoprecError):
    """A target device is unknown, absent, or cannot run what was asked."""


class InfeasibleError(AutoprecError):
    """No assignment satisfies the constraints."""


class WorkerError(AutoprecError):
    """A process or a cluster's job that trains a branch was refused, lost or killed."""


class TrainingStoppedError(AutoprecError):
    """Something went wrong in a guarded run, and the guard was asked to stop it."""
