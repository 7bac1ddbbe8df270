"""Complex parameters as real numbers: the optimizer weighs both parts, the errors are of both."""

import torch
from torch import Tensor


def real_view(tensor: Tensor) -> Tensor:
    """Return a view of a tensor's real numbers; of a complex one both parts, in a last dimension.

    >>> real_view(torch.zeros(3, dtype=torch.complex64)).shape
    torch.Size([3, 2])
    """
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def of_dtype(numbers: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient's real numbers (`real_view`) as the parameter's own dtype has them."""
    if parameter.is_complex():
        numbers = torch.view_as_complex(numbers)
    return numbers.to(parameter.dtype)
