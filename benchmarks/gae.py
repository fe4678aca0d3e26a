"""
How to solve the recursion of GAE: five ways, timed on the two shapes that matter.

    Ψ_t = δ_t + c_t Ψ_{t+1}   with c_t = γλ (1 − done_t)

    python benchmarks/gae.py
    python benchmarks/gae.py --device cuda --seconds 2

`docs/design.md` holds the table that decided. A long rollout of one environment (T=2048, N=1) and a short one of many
(T=128, N=4096); one thread, float32; milliseconds, the best of several rounds.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch as th

from sb3_pgplus.core.advantages import reverse_scan

SHAPES = ((2048, 1), (128, 4096))
GAMMA, GAE_LAMBDA = 0.99, 0.95
BLOCK = 32


def doubling(decay: th.Tensor, deltas: th.Tensor) -> th.Tensor:
    """Hillis and Steele's scan: every step looks 1, 2, 4, … steps ahead. O(T log T) work, log T rounds."""
    decay, total = decay.clone(), deltas.clone()
    width = 1
    while width < len(total):
        ahead = total[width:].clone()
        total[:-width].addcmul_(decay[:-width], ahead)
        decay[:-width] *= decay[width:].clone()
        # Beyond the end there is nothing left to add.
        decay[-width:] = 0
        width *= 2
    return total


def blocked(decay: th.Tensor, deltas: th.Tensor) -> th.Tensor:
    """A loop over the steps inside a block, all blocks at once; then a loop over the blocks."""
    n_steps, n_envs = deltas.shape
    n_blocks = n_steps // BLOCK
    total = deltas.view(n_blocks, BLOCK, n_envs).clone()
    product = decay.view(n_blocks, BLOCK, n_envs).clone()
    for step in reversed(range(BLOCK - 1)):
        total[:, step].addcmul_(product[:, step], total[:, step + 1])
        product[:, step] *= product[:, step + 1]
    for block in reversed(range(n_blocks - 1)):
        total[block].addcmul_(product[block], total[block + 1, 0])
    return total.view(n_steps, n_envs)


def torch_loop(decay: th.Tensor, deltas: th.Tensor) -> th.Tensor:
    """One Python iteration a step."""
    total = deltas.clone()
    for step in reversed(range(len(total) - 1)):
        total[step].addcmul_(decay[step], total[step + 1])
    return total


def numpy_loop(decay: th.Tensor, deltas: th.Tensor) -> th.Tensor:
    """The same in NumPy, as SB3's rollout buffer does it."""
    factors, total = decay.cpu().numpy(), deltas.cpu().numpy().copy()
    for step in reversed(range(len(total) - 1)):
        total[step] += factors[step] * total[step + 1]
    return th.from_numpy(total).to(deltas.device)


WAYS: dict[str, Callable[[th.Tensor, th.Tensor], th.Tensor]] = {
    "odd-even reduction": reverse_scan,
    "doubling": doubling,
    "blocked": blocked,
    "torch loop": torch_loop,
    "NumPy loop": numpy_loop,
}


def milliseconds(way: Callable[[], th.Tensor], device: th.device, seconds: float) -> float:
    """The shortest time of one call; other programs on the machine can only make it longer."""
    best, end = float("inf"), time.perf_counter() + seconds
    way()
    while time.perf_counter() < end:
        start = time.perf_counter()
        way()
        if device.type == "cuda":
            th.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 1000 * best


def main() -> None:
    parser = argparse.ArgumentParser(description="Time five ways to compute GAE.")
    parser.add_argument("--device", type=th.device, default=th.device("cpu"))
    parser.add_argument("--seconds", type=float, default=1.0, help="per way and shape")
    args = parser.parse_args()
    th.set_num_threads(1)

    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for n_steps, n_envs in SHAPES:
        generator = np.random.default_rng(0)
        deltas = th.as_tensor(generator.normal(size=(n_steps, n_envs)), dtype=th.float32, device=args.device)
        dones = th.as_tensor(generator.random((n_steps, n_envs)) < 0.01, device=args.device)
        decay = GAMMA * GAE_LAMBDA * (~dones).float()
        expected = numpy_loop(decay, deltas)
        for name, way in WAYS.items():
            th.testing.assert_close(way(decay, deltas), expected, rtol=1e-4, atol=1e-4)
            times[name].append(milliseconds(partial(way, decay, deltas), args.device, args.seconds))

    titles = [f"T={n_steps} N={n_envs}" for n_steps, n_envs in SHAPES]
    print(f"| milliseconds, {args.device} | {' | '.join(titles)} |")
    print("|---|" + "---:|" * len(titles))
    for name, row in times.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} |")


if __name__ == "__main__":
    main()
