"""Every error a user can cause, and what the command line does with it.

AutoprecError                 exit status 2, one line: the rule, what came, the way out
├── SettingsError             an option or argument is not one that autoprec takes
├── WorkloadError             the user's model.py breaks the five-function contract
├── CaptureError              one real step did not give a usable model spec
├── RecordError               a record file is missing, truncated, edited wrongly or from elsewhere
├── PlanMismatchError         a plan does not fit the model, the optimizer or the device
├── DeviceError               a target is unknown, absent or cannot do what was asked
├── InfeasibleError           no plan satisfies the constraints
└── TrainingStoppedError      the guard was asked to stop a run that goes wrong
"""


class AutoprecError(Exception):
    """Root of the errors that autoprec raises on purpose; `str(error)` is one line."""


class SettingsError(AutoprecError):
    """An option of the command line, or an argument in Python, has a wrong value."""


class WorkloadError(AutoprecError):
    """A function of the user's file is missing or misbehaves."""


class CaptureError(AutoprecError):
    """One real training step could not be recorded."""


class RecordError(AutoprecError):
    """A record file cannot be read, written or trusted."""


class PlanMismatchError(AutoprecError):
    """A plan names something that the model, optimizer or device does not have."""


class DeviceError(AutoprecError):
    """A target device is unknown, absent, or cannot run what was asked."""


class InfeasibleError(AutoprecError):
    """No assignment satisfies the constraints."""


class TrainingStoppedError(AutoprecError):
    """Something went wrong in a guarded run, and the guard was asked to stop it."""
