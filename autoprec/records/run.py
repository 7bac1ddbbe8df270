"""The record of a run folder itself: what ran in it, and how far it came."""

from typing import ClassVar

from autoprec.records.base import FileRecord


class RunState(FileRecord):
    """`run.json`: a digest of the inputs of every finished stage.

    `script` is the training script that was recorded, with its arguments; "" of other workloads.
    """

    KIND: ClassVar[str] = "run"
    REMAKE: ClassVar[str] = "`autoprec tune`, without --resume"

    stages: dict[str, str]
    script: str = ""
