"""
How to multiply with the Fisher matrix: four ways that give the same vector, timed for SB3's Gaussian 64×64 policy.

    python benchmarks/fisher_product.py
    python benchmarks/fisher_product.py --states 8192 --hidden 256 --device cuda

`docs/design.md` holds the table that decided. Every round interleaves all ways; a figure is the median over rounds of
set-up plus 16 products (one TRPO step with 15 conjugate-gradient steps), one thread, float32, milliseconds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.func import functional_call, jvp, linearize, vjp

from sb3_pgplus.core.natural_gradient import MatVec, fisher_vector_product, flatten, unflatten
from sb3_pgplus.policies import distribution_parameters, fisher_outputs, kl_old_new

N_PRODUCTS = 16


class Problem:
    """A policy on random states, its actor's parameters and its distribution as a function of them."""

    def __init__(self, n_states: int, hidden: int, device: str) -> None:
        th.manual_seed(0)
        box = spaces.Box(-1, 1, (17,))
        arch = {"pi": [hidden, hidden], "vf": []}
        policy = ActorCriticPolicy(box, spaces.Box(-1, 1, (6,)), lambda _: 0.0, net_arch=arch).to(device)
        self.policy, self.states = policy, th.randn(n_states, 17, device=device)
        names = [n for n, _ in policy.named_parameters() if "value" not in n]
        self.named = {n: p for n, p in policy.named_parameters() if n in names}
        self.parameters = list(self.named.values())

    def outputs_of(self, named: dict[str, th.Tensor]) -> th.Tensor:
        """Mean and std flattened, as a function of the parameters."""

        class Outputs(th.nn.Module):
            def __init__(self, policy: ActorCriticPolicy) -> None:
                super().__init__()
                self.policy = policy

            def forward(self, states: th.Tensor) -> th.Tensor:
                inner = self.policy.get_distribution(states).distribution
                return th.cat([inner.loc.flatten(), inner.scale.flatten()])

        prefixed = {f"policy.{name}": value for name, value in named.items()}
        result: th.Tensor = functional_call(Outputs(self.policy), prefixed, (self.states,))
        return result


def double_backprop(problem: Problem) -> MatVec:
    """Hessian of the mean KL: differentiate its gradient (what sb3-contrib does)."""
    distribution = problem.policy.get_distribution(problem.states)
    kl = kl_old_new(distribution_parameters(distribution), distribution).mean()
    gradient = flatten(th.autograd.grad(kl, problem.parameters, create_graph=True))
    return lambda v: flatten(th.autograd.grad(gradient @ v, problem.parameters, retain_graph=True))


def gauss_newton(problem: Problem) -> MatVec:
    """JᵀMJv, Jv by the double-backward trick: the package's own."""
    distribution = problem.policy.get_distribution(problem.states)
    return fisher_vector_product(*fisher_outputs(distribution), problem.parameters)


def forward_mode(problem: Problem) -> MatVec:
    """JᵀMJv, Jv by forward mode, evaluated anew at every product."""
    return _functional(problem, lambda named, tangents: jvp(problem.outputs_of, (named,), (tangents,))[1])


def linearized(problem: Problem) -> MatVec:
    """JᵀMJv, Jv by `torch.func.linearize`, which records the forward mode once."""
    _, push = linearize(problem.outputs_of, {n: p.detach() for n, p in problem.named.items()})
    return _functional(problem, lambda _, tangents: push(tangents))


def _functional(problem: Problem, push: Callable[[dict[str, th.Tensor], dict[str, th.Tensor]], th.Tensor]) -> MatVec:
    _, metric = fisher_outputs(problem.policy.get_distribution(problem.states))
    named = {n: p.detach() for n, p in problem.named.items()}
    _, pull = vjp(problem.outputs_of, named)

    def product(v: th.Tensor) -> th.Tensor:
        tangents = dict(zip(named, unflatten(v, problem.parameters), strict=True))
        (pulled,) = pull(metric(push(named, tangents)) / len(problem.states))
        return flatten(list(pulled.values()))

    return product


WAYS = {
    "double backprop": double_backprop,
    "Gauss–Newton, double backward": gauss_newton,
    "Gauss–Newton, jvp": forward_mode,
    "Gauss–Newton, linearize": linearized,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    th.set_num_threads(1)
    th.distributions.Distribution.set_default_validate_args(False)
    problem = Problem(options.states, options.hidden, options.device)
    v = flatten([th.randn_like(p) for p in problem.parameters])
    reference = double_backprop(problem)(v)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name, way in WAYS.items():
            started = time.perf_counter()
            matvec = way(problem)
            for _ in range(N_PRODUCTS):
                result = matvec(v)
            seconds[name].append(time.perf_counter() - started)
            assert th.allclose(result, reference, rtol=1e-3, atol=1e-5), name
    base = statistics.median(seconds["double backprop"])
    print(f"| way | {options.states} states, {options.hidden}×{options.hidden}: ms | times double backprop |")
    print("|---|---|---|")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name} | {median * 1e3:.1f} | {base / median:.2f} |")


if __name__ == "__main__":
    main()
