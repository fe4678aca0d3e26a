"""
The natural gradient: conjugate gradient, Fisher-vector products, backtracking line search.

Every routine returns its result and changes nothing; who called it commits the step, or does not.

References: TRPO is "Trust Region Policy Optimization" (Schulman et al. 2015, https://arxiv.org/abs/1502.05477), NPG "A
Natural Policy Gradient" (Kakade 2001).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th

MatVec = Callable[[th.Tensor], th.Tensor]

NEGATIVE_CURVATURE = "negative curvature"
NON_FINITE = "non-finite values"


class _Solution(NamedTuple):
    x: th.Tensor
    residual_norm: float
    n_steps: int


class ConjugateGradientResult(_Solution):
    """
    ``x, residual_norm, n_steps``, and as attributes what else is known.

    ``residual`` is the vector ``b − Ax``; ``problem`` is empty, ``"negative curvature"`` (A is not positive definite)
    or ``"non-finite values"``, and then ``x`` is the last iterate before it.
    """

    residual: th.Tensor
    problem: str


@th.no_grad()
def conjugate_gradient(matvec: MatVec, b: th.Tensor, *, max_steps: int, tol: float) -> ConjugateGradientResult:
    """
    Solve ``Ax = b`` for a symmetric positive definite A given by its products (TRPO paper, appendix C.1; Hestenes and
    Stiefel 1952). It starts at zero, so the same inputs give the same bits, and ends once ``‖b − Ax‖ ≤ tol ‖b‖``.

    :param matvec: v ↦ Av, ``[P] → [P]``
    :param b: right-hand side, ``[P]``
    :param max_steps: most steps, each with one product; ≥ 0
    :param tol: relative tolerance of the residual, ≥ 0
    :return: x ``[P]``, the norm of its residual (by one more product, free of the recursion's drift), number of steps
    :raises ValueError: if b is not a vector, or a limit is negative
    """
    if b.ndim != 1:
        raise ValueError(f"`b` must be a vector [P], got shape {list(b.shape)}")
    if max_steps < 0 or not tol >= 0:
        raise ValueError(f"`max_steps` and `tol` must be >= 0, got {max_steps} and {tol}")
    # Powers of two are exact: the same digits, and squares that neither underflow nor overflow.
    largest = float(b.abs().max()) if b.numel() else 0.0
    scale = 2.0 ** math.frexp(largest)[1] if math.isfinite(largest) and largest > 0 else 1.0
    x, residual = th.zeros_like(b), b / scale
    direction, squared = residual.clone(), float(residual @ residual)
    threshold, n_steps = tol * math.sqrt(squared) if squared >= 0 else math.nan, 0
    problem = "" if math.isfinite(squared) else NON_FINITE
    while not problem and n_steps < max_steps and math.sqrt(squared) > threshold:
        product = matvec(direction)
        curvature = float(direction @ product)
        problem = _problem_with(curvature)
        if problem:
            break
        step = squared / curvature
        residual = residual - step * product
        new_squared, new_x = float(residual @ residual), x + step * direction
        if not math.isfinite(new_squared) or not bool((new_x * scale).isfinite().all()):
            problem = NON_FINITE
            break
        x, n_steps = new_x, n_steps + 1
        direction = residual + (new_squared / squared) * direction
        squared = new_squared
    x = x * scale
    final = b - matvec(x) if n_steps else b
    result = ConjugateGradientResult(x, float(th.linalg.vector_norm(final)), n_steps)
    result.residual, result.problem = final, problem
    return result


def _problem_with(curvature: float) -> str:
    if not math.isfinite(curvature):
        return NON_FINITE
    return NEGATIVE_CURVATURE if curvature <= 0 else ""


def fisher_vector_product(
    outputs: Sequence[th.Tensor], metric: MatVec, parameters: Sequence[th.Tensor], *, damping: float = 0.0
) -> MatVec:
    """
    Products with the Fisher matrix of a policy in Gauss–Newton form, without forming it::

        F v = 1/B Σ_b J_bᵀ M_b J_b v + η v

    where ``J = ∂y/∂θ`` is the Jacobian of the distribution's parameters y and M their own Fisher matrix. At θ_old this
    is the Hessian of the mean KL (TRPO paper, appendix C), and positive semi-definite by construction (Martens 2020,
    "New insights and perspectives on the natural gradient method", section 9). The double-backward trick gives Jv: the
    graph of ``u ↦ Jᵀu`` is built once, every product differentiates it.

    :param outputs: y as functions of the parameters, each ``[B, ...]``, with their graph
    :param metric: dy ↦ M dy on all outputs flattened and concatenated, ``[ΣB·K] → [ΣB·K]``
    :param parameters: θ
    :param damping: η ≥ 0
    :return: v ↦ Fv, ``[P] → [P]``, in the order of ``parameters``
    :raises ValueError: on a negative damping
    """
    if not damping >= 0:
        raise ValueError(f"`damping` must be >= 0, got {damping}")
    n_states = outputs[0].shape[0]
    with th.enable_grad():
        y = th.cat([output.reshape(-1) for output in outputs])
        u = th.zeros_like(y, requires_grad=True)
        pulled_back = flatten(th.autograd.grad(y, parameters, u, create_graph=True, materialize_grads=True))

    def multiply(v: th.Tensor) -> th.Tensor:
        (dy,) = th.autograd.grad(pulled_back, u, v, retain_graph=True)
        weighted = metric(dy) / n_states
        pulled = th.autograd.grad(y, parameters, weighted, retain_graph=True, materialize_grads=True)
        product = flatten(pulled)
        return product + damping * v if damping else product

    return multiply


def flatten(tensors: Sequence[th.Tensor]) -> th.Tensor:
    """Concatenate tensors to one vector ``[P]``."""
    return th.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: th.Tensor, like: Sequence[th.Tensor]) -> list[th.Tensor]:
    """
    Cut a vector ``[P]`` into tensors.

    :param vector: as :func:`flatten` made it
    :param like: tensors of the wanted shapes
    :return: views of the vector
    """
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def trust_region_scale(curvature: float, max_kl: float) -> float:
    """
    ``√(2δ / xᵀFx)``, the factor with which ``½ dᵀFd = δ`` for ``d = factor · x`` (TRPO paper, appendix C).

    :param curvature: xᵀFx
    :param max_kl: δ > 0, in nats
    :return: the factor; 0 where the curvature is not positive and finite: then there is no step to make
    """
    return 0.0 if _problem_with(curvature) else math.sqrt(2 * max_kl / curvature)


class LineSearchResult(NamedTuple):
    """What a line search found; a failed one found the step of length 0."""

    accepted: bool
    #: Share of the full step.
    fraction: float
    #: Candidates that were evaluated.
    n_steps: int
    #: Of the surrogate, at the step that is returned.
    improvement: float
    #: Mean KL(π_old‖π_θ) at the step that is returned, in nats.
    kl: float


def backtracking_line_search(
    evaluate: Callable[[float], tuple[float, float]],
    *,
    max_kl: float,
    shrinking_factor: float = 0.5,
    max_steps: int = 10,
) -> LineSearchResult:
    """
    The longest of the steps 1, s, s², … that improves the surrogate within the trust region (TRPO paper, appendix C):
    ``L(θ) > L(θ_old)`` and ``E KL(π_old‖π_θ) ≤ δ``. NaN is no improvement.

    :param evaluate: share of the full step ↦ improvement of the surrogate, mean KL; it changes nothing
    :param max_kl: δ
    :param shrinking_factor: s, in (0, 1)
    :param max_steps: most candidates
    :return: the first acceptable step, or the step of length 0
    :raises ValueError: on a shrinking factor outside (0, 1)
    """
    if not 0 < shrinking_factor < 1:
        raise ValueError(f"`shrinking_factor` must be in (0, 1), got {shrinking_factor}")
    for n in range(max_steps):
        fraction = shrinking_factor**n
        improvement, kl = evaluate(fraction)
        if improvement > 0 and kl <= max_kl:
            return LineSearchResult(True, fraction, n + 1, improvement, kl)
    return LineSearchResult(False, 0.0, max_steps, 0.0, 0.0)
