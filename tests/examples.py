"""How many random examples a test takes: a few for everyone, many in `make test-random`."""

from hypothesis import settings

MORE = 20  # `make test-random` against `make test`


def examples(count: int) -> settings:
    """Return the settings of a test that takes `count` examples, the same ones in each run."""
    return settings(max_examples=count if settings().derandomize else MORE * count)
