"""The perceptron's outputs and gradients by hand: `nn.Sequential` and autograd as oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sb3_pgplus.core.mlp import Layer, mlp_backward, mlp_forward

F64 = torch.float64
MODULES = {"tanh": nn.Tanh, "relu": nn.ReLU}
DTYPES = ((torch.float32, 1e-6), (F64, 1e-13))


def perceptron(depth: int, activation: str, dtype: torch.dtype = F64) -> tuple[nn.Sequential, list[Layer]]:
    """`depth` linear layers of widths 5, 7, 6, 4, 3 with activations in between, as modules and as layers."""
    torch.manual_seed(depth)
    widths = [5, 7, 6, 4, 3]
    linears = [nn.Linear(widths[i], widths[i + 1], dtype=dtype) for i in range(depth)]
    modules: list[nn.Module] = []
    for linear in linears:
        modules += [linear, MODULES[activation]()]
    layers = [Layer(linear.weight, linear.bias, activation) for linear in linears]
    layers[-1] = layers[-1]._replace(activation=None)
    return nn.Sequential(*modules[:-1]), layers


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("batch_size", [1, 2, 33])
@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_outputs_and_gradients_are_those_of_autograd(
    depth: int, activation: str, batch_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    network, layers = perceptron(depth, activation, dtype)
    x = normal(1, batch_size, 5, dtype=dtype)
    expected = network(x)
    d_output = normal(2, *expected.shape, dtype=dtype)
    gradients = torch.autograd.grad(expected, list(network.parameters()), d_output)

    outputs = mlp_forward(x, layers)
    assert len(outputs) == depth + 1 and outputs[0] is x
    assert torch.equal(outputs[-1], expected)  # the same kernels, so the same bits
    for output, partial in zip(outputs[1:], (network[: 2 * i] for i in range(1, depth)), strict=False):
        assert torch.equal(output, partial(x))  # after each activation
    actual = mlp_backward(d_output, outputs, layers)
    assert [g.shape for g in actual] == [p.shape for p in network.parameters()]
    for gradient, reference in zip(actual, gradients, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=10 * tolerance)


def test_one_layer_has_the_hand_derived_gradients() -> None:
    # y = W x + b with x = (1, 2) and (3, 4), dy = 1 and 10: dW = 1 (1, 2) + 10 (3, 4) = (31, 42), db = 11
    layer = Layer(torch.tensor([[1.0, -1.0]]), torch.tensor([0.5]), None)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    outputs = mlp_forward(x, [layer])
    assert torch.equal(outputs[1], torch.tensor([[-0.5], [-0.5]]))  # 1 − 2 + 0.5, 3 − 4 + 0.5
    weight, bias = mlp_backward(torch.tensor([[1.0], [10.0]]), outputs, [layer])
    assert torch.equal(weight, torch.tensor([[31.0, 42.0]]))
    assert torch.equal(bias, torch.tensor([11.0]))


def test_relu_passes_no_gradient_where_its_input_is_exactly_zero() -> None:
    # z = (0, −1, 2) → h = (0, 0, 2): autograd's relu has slope 0 at 0, so of db = f'(z) only the last is 1
    hidden = Layer(torch.eye(3), torch.zeros(3), "relu")
    last = Layer(torch.ones(1, 3), torch.zeros(1), None)
    outputs = mlp_forward(torch.tensor([[0.0, -1.0, 2.0]]), [hidden, last])
    gradients = mlp_backward(torch.ones(1, 1), outputs, [hidden, last])
    assert torch.equal(gradients[1], torch.tensor([0.0, 0.0, 1.0]))


@pytest.mark.parametrize("activation", MODULES)
def test_nothing_carries_a_graph_and_nothing_is_changed(activation: str) -> None:
    network, layers = perceptron(3, activation)
    x, d_output = normal(1, 4, 5).requires_grad_(), normal(2, 4, 4).requires_grad_()
    tensors = [x, d_output, *network.parameters()]
    before = [tensor.detach().clone() for tensor in tensors]
    outputs = mlp_forward(x, layers)
    kept = [output.detach().clone() for output in outputs]
    gradients = mlp_backward(d_output, outputs, layers)
    assert not any(tensor.requires_grad for tensor in (*outputs[1:], *gradients))
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
    assert all(torch.equal(output, old) for output, old in zip(outputs, kept, strict=True))
    assert all(tensor.grad is None for tensor in tensors)
