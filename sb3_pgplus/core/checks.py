"""Argument checks shared by the pure functions: wrong input is named at once, nothing broadcasts silently."""

import torch as th


def check_same_shape(**tensors: th.Tensor) -> None:
    """
    Require equal shapes, so that ``[B]`` against ``[B, 1]`` cannot silently become ``[B, B]``.

    :param tensors: name → tensor, the first one sets the shape
    :raises ValueError: if a shape differs from the first one's
    """
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ValueError(
                f"`{name}` has shape {list(tensor.shape)} but `{first}` has shape {list(reference.shape)}: "
                "they must be equal (nothing is broadcast)"
            )


def check_floating(**tensors: th.Tensor) -> None:
    """
    Require floating-point tensors.

    :param tensors: name → tensor
    :raises TypeError: if a tensor holds integers or booleans
    """
    for name, tensor in tensors.items():
        is_floating = tensor.is_floating_point() if isinstance(tensor, th.Tensor) else tensor.dtype.kind == "f"
        if not is_floating:
            raise TypeError(f"`{name}` must be a floating-point tensor, got {tensor.dtype}")


def check_unit_interval(**values: float) -> None:
    """
    Require numbers in [0, 1].

    :param values: name → number
    :raises ValueError: if a number lies outside
    """
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"`{name}` must be in [0, 1], got {value}")
