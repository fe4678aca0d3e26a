"""
A multilayer perceptron and its gradient written out: for small layers autograd's bookkeeping costs more than the sums.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th

#: name → (the function in place, dz from dh and h = f(z))
ACTIVATIONS: dict[str, tuple[Callable[[th.Tensor], th.Tensor], Callable[[th.Tensor, th.Tensor], th.Tensor]]] = {
    "tanh": (th.tanh_, th.ops.aten.tanh_backward),
    "relu": (th.relu_, lambda dh, h: th.ops.aten.threshold_backward(dh, h, 0)),
}


class Layer(NamedTuple):
    """``h = f(W x + b)`` with W ``[K, I]``, b ``[K]``; no f in the last layer."""

    weight: th.Tensor
    bias: th.Tensor
    activation: str | None


@th.no_grad()
def mlp_forward(x: th.Tensor, layers: Sequence[Layer]) -> list[th.Tensor]:
    """
    All layers' outputs.

    :param x: input, ``[B, I]``
    :param layers: from the first to the last
    :return: x, then each layer's output ``[B, K]``
    """
    outputs = [x]
    for layer in layers:
        z = th.addmm(layer.bias, outputs[-1], layer.weight.t())
        outputs.append(z if layer.activation is None else ACTIVATIONS[layer.activation][0](z))
    return outputs


@th.no_grad()
def mlp_backward(d_output: th.Tensor, outputs: Sequence[th.Tensor], layers: Sequence[Layer]) -> list[th.Tensor]:
    """
    Gradients of a loss with respect to the parameters::

        dW = dzᵀ x,  db = Σ_b dz,  dx = dz W,  dz = f'(z) dh

    :param d_output: the loss's gradient with respect to the last layer's output, ``[B, K]``
    :param outputs: from :func:`mlp_forward`
    :param layers: the same
    :return: dW, db of each layer, from the first to the last
    """
    gradients: list[th.Tensor] = []
    dh = d_output
    for i in range(len(layers) - 1, -1, -1):
        layer = layers[i]
        dz = dh if layer.activation is None else ACTIVATIONS[layer.activation][1](dh, outputs[i + 1])
        gradients += [dz.sum(0), dz.t() @ outputs[i]]
        if i > 0:
            dh = dz @ layer.weight
    return gradients[::-1]
