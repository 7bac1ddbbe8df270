"""How a process tells that an error is not its own: another rank of its run is gone. No torch."""

BACKENDS_SAY = ("gloo", "Connection reset", "Connection closed", "NCCL")


def is_of_lost_rank(error: BaseException) -> bool:
    """Whether torch.distributed raised an error since it does not reach another rank.

    >>> is_of_lost_rank(RuntimeError("Connection closed by peer [127.0.0.1]:9647"))
    True
    """
    if not isinstance(error, RuntimeError):
        return False
    is_its_class = any(each.__name__ == "DistError" for each in type(error).__mro__)
    return is_its_class or any(words in str(error) for words in BACKENDS_SAY)
