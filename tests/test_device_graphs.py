"""
Work recorded for a device: on a GPU where there is one, and on the CPU by a recorder that is like CUDA graphs.

The oracle is the same training run eagerly.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch as th
from device_tasks import DictTask
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from tape import record_on_tape

from sb3_pgplus import A2CPlus, PPOPlus, TRPOPlus, compiler, device_graphs, make_vec_env, recorded_update
from sb3_pgplus.buffers import TorchRolloutBuffer
from sb3_pgplus.core.natural_gradient import fisher_vector_product
from sb3_pgplus.device_graphs import RecordedCall, RecordedLoop
from sb3_pgplus.policies import fisher_outputs

N_ENVS = 4
#: 64 · 4 samples in minibatches of 32, four times over.
PPO: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 4}


@dataclass
class Recordings:
    """Where trainings run, and what was recorded."""

    device: str
    functions: list[Callable[[], Any]] = field(default_factory=list)

    def train(self, algorithm: Any = PPOPlus, env: Any = "Pendulum-v1", n: int = 3, **settings: Any) -> Any:
        """n rollouts of a new model."""
        callback = settings.pop("callback", None)
        policy = settings.pop("policy", "MlpPolicy")
        model = algorithm(policy, make_vec_env(env, N_ENVS, seed=0), seed=0, device=self.device, **settings)
        model.learn(n * model.n_steps * N_ENVS, callback)
        return model


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not th.cuda.is_available(), reason="no GPU"))]
)
def recordings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recordings:
    found = Recordings(request.param)
    recorder = record_on_tape if request.param == "cpu" else device_graphs.RECORDERS["cuda"]

    def record(function: Callable[[], Any], device: th.device) -> Any:
        found.functions.append(function)
        return recorder(function, device)

    def refuse(*_: Any) -> Any:
        raise RuntimeError("compiled code leaves nothing on a tape")

    monkeypatch.setitem(device_graphs.RECORDERS, request.param, record)
    if request.param == "cpu":
        monkeypatch.setattr(compiler, "_compile", refuse)
    return found


def parameters_of(model: Any) -> dict[str, th.Tensor]:
    return {name: value.detach().cpu() for name, value in model.policy.named_parameters()}


def assert_same(recorded: Any, eager: Any, tolerance: float = 1e-5) -> None:
    """The same parameters, moments and counters, and the same random stream afterwards."""
    expected = parameters_of(eager)
    for name, value in parameters_of(recorded).items():
        assert th.allclose(value, expected[name], atol=tolerance), name
    states = [model.policy.optimizer.state_dict()["state"] for model in (recorded, eager)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        for name, value in state.items():
            assert th.allclose(value.cpu(), states[1][number][name].cpu(), atol=tolerance), (number, name)
    assert recorded._n_updates == eager._n_updates


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (PPOPlus, PPO),
        (PPOPlus, PPO | {"recompute_advantages": False}),
        (PPOPlus, PPO | {"batch_size": 48}),  # 256 = 5 · 48 + 16
        (PPOPlus, PPO | {"batch_size": 256}),
        (PPOPlus, PPO | {"batch_size": 48, "critic_learning_rate": 1e-3}),  # two groups, stepped eagerly in between
        (PPOPlus, PPO | {"clip_range_vf": 0.2, "learning_rate": "lin_1e-3", "ent_coef": "lin_0.01"}),
        (PPOPlus, PPO | {"desired_kl": 0.01}),
        (PPOPlus, PPO | {"n_critic_epochs": 6}),
        (PPOPlus, PPO | {"n_critic_epochs": 2, "kl_coef": 0.3, "adaptive_kl_target": 0.01}),
        (PPOPlus, PPO | {"normalize_value_targets": True, "max_grad_norm": None}),
        (A2CPlus, {"n_steps": 16}),
        (A2CPlus, {"n_steps": 16, "use_rms_prop": False}),
        (TRPOPlus, {"n_steps": 64, "batch_size": 32, "n_critic_updates": 3}),
        # States with gaps between them.
        (TRPOPlus, {"n_steps": 64, "fisher_sub_sampling_factor": 2, "normalize_observations": False}),
    ],
)
def test_recorded_updates_equal_eager_ones(recordings: Recordings, algorithm: Any, settings: dict[str, Any]) -> None:
    recorded = recordings.train(algorithm, compile=True, **settings)
    stream = np.random.get_state()
    eager = recordings.train(algorithm, compile=False, **settings)
    # The policy's step, an update, perhaps the critic's own one, and the Fisher products of a trust region.
    n_functions = 2 + ("n_critic_epochs" in settings) + (algorithm is TRPOPlus)
    assert len(recordings.functions) == n_functions
    assert "recorded" not in recorded.engine_report()  # which would say why not
    assert_same(recorded, eager)
    assert all(np.array_equal(a, b) for a, b in zip(stream, np.random.get_state(), strict=True))


@pytest.mark.parametrize(
    ("algorithm", "settings"), [(PPOPlus, PPO), (A2CPlus, {"n_steps": 16}), (TRPOPlus, PPO | {"n_critic_updates": 3})]
)
def test_discrete_actions_are_recorded(recordings: Recordings, algorithm: Any, settings: dict[str, Any]) -> None:
    settings = {name: value for name, value in settings.items() if algorithm is PPOPlus or name != "n_epochs"}
    recorded = recordings.train(algorithm, "CartPole-v1", compile=True, **settings)
    assert len(recordings.functions) == 2 + (algorithm is TRPOPlus)
    assert_same(recorded, recordings.train(algorithm, "CartPole-v1", compile=False, **settings))


def test_dict_observations_are_recorded(recordings: Recordings) -> None:
    settings = PPO | {"policy": "MultiInputPolicy", "env": DictTask}
    recorded = recordings.train(compile=True, **settings)
    assert len(recordings.functions) == 2
    assert_same(recorded, recordings.train(compile=False, **settings))


class PictureTask(DictTask):
    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)  # type: ignore[assignment]  # another kind
    action_space = spaces.Discrete(3)  # type: ignore[assignment]

    length = 100  # it is cut before

    def _observation(self) -> Any:
        return self.np_random.integers(256, size=(36, 36, 1), dtype=np.uint8)


def test_pictures_are_recorded(recordings: Recordings) -> None:
    settings = {"policy": "CnnPolicy", "env": PictureTask, "n_steps": 16, "batch_size": 32, "n_epochs": 2}
    recorded = recordings.train(compile=True, **settings)
    assert len(recordings.functions) == 2
    assert_same(recorded, recordings.train(compile=False, **settings))


@pytest.mark.parametrize("recompute", [True, False])
def test_early_stops_are_the_eager_ones(recordings: Recordings, recompute: bool) -> None:
    settings = PPO | {"target_kl": 1e-3, "learning_rate": 1e-3, "n_epochs": 8, "recompute_advantages": recompute}
    recorded = recordings.train(compile=True, n=4, **settings)
    stream = np.random.get_state()
    eager = recordings.train(compile=False, n=4, **settings)
    assert eager._n_updates < 4 * 8  # there were some
    assert_same(recorded, eager)
    # What the device was given in advance took nothing from the random stream.
    assert all(np.array_equal(a, b) for a, b in zip(stream, np.random.get_state(), strict=True))


@pytest.mark.parametrize(("settings", "expected"), [({"recompute_advantages": False}, 1), ({}, 4)])
def test_the_device_is_asked_once_for_all_epochs_between_which_nothing_happens(
    recordings: Recordings, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: int
) -> None:
    rows: list[int] = []
    run = RecordedLoop.run
    monkeypatch.setattr(
        RecordedLoop, "run", lambda loop, samples, r, *args: rows.append(len(r)) or run(loop, samples, r, *args)
    )
    model = recordings.train(compile=True, n=10, **PPO, **settings)
    # 320 minibatches; those with numbers 1, 2, 4, …, 256 are compared with the eager update, one at a time.
    assert sum(rows) == 10 * 32
    assert rows.count(1) >= 9
    of_last = [32] if expected == 1 else [8] * 4  # number 288 … 320: none is compared
    assert rows[-expected:] == of_last
    assert model._n_updates == 40


class _Spoil(BaseCallback):
    """Makes the advantages of some samples of a rollout NaN."""

    def __init__(self, rollout: int, share: float) -> None:
        super().__init__()
        self.rollout, self.share, self.count = rollout, share, 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.count += 1
        if self.count == self.rollout:
            advantages = self.model.rollout_buffer.tensor("advantages")  # type: ignore[attr-defined]  # ours
            n = max(1, int(self.share * advantages.numel()))
            advantages.view(-1)[:n] = float("nan")


def test_minibatches_that_are_not_finite_are_left_out_as_by_the_eager_update(recordings: Recordings) -> None:
    settings = PPO | {"recompute_advantages": False, "normalize_advantage": False}
    models = [
        recordings.train(compile=compiled, n=3, callback=_Spoil(2, share=0.0), **settings) for compiled in (True, False)
    ]
    assert models[0]._nonfinite_updates == models[1]._nonfinite_updates == 4  # one sample: a minibatch of each epoch
    assert_same(*models)


def test_too_many_failures_in_a_row_end_the_update_where_the_eager_one_ends(recordings: Recordings) -> None:
    settings = PPO | {"recompute_advantages": False, "max_nonfinite_updates": 3, "normalize_advantage": False}
    found = []
    for compiled in (True, False):
        kept: list[Any] = []
        with pytest.raises(ValueError, match=r"3 updates in a row .* advantages"):
            recordings.train(compile=compiled, callback=[_Spoil(2, share=0.3), _Keep(kept)], **settings)
        found.append(kept[0])
    assert found[0]._nonfinite_updates == found[1]._nonfinite_updates
    assert_same(*found)


class _Keep(BaseCallback):
    def __init__(self, models: list[Any]) -> None:
        super().__init__()
        self.models = models

    def _on_training_start(self) -> None:
        self.models.append(self.model)

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("n_critic_epochs", [2, 6])
def test_states_that_two_functions_join_in_turn_are_not_recorded_for_ever(
    recordings: Recordings, n_critic_epochs: int
) -> None:
    settings = PPO | {"n_critic_epochs": n_critic_epochs}
    recorded = recordings.train(compile=True, n=12, **settings)
    assert len(recordings.functions) <= 1 + 2 * recorded_update._MOST_RECORDINGS
    assert_same(
        recorded, recordings.train(compile=False, n=12, **settings), tolerance=1e-3
    )  # a sample at the edge of a clip


class _Forgiving(PPOPlus):
    """Never ends a training."""

    def _count_nonfinite(self, loss: th.Tensor, batch: Any) -> None:
        self._nonfinite_updates += 1


def test_who_counts_failures_otherwise_makes_the_steps(recordings: Recordings) -> None:
    settings = PPO | {"recompute_advantages": False, "max_nonfinite_updates": 2, "normalize_advantage": False}
    assert_same(
        *(
            recordings.train(_Forgiving, compile=compiled, callback=_Spoil(2, share=0.3), **settings)
            for compiled in (True, False)
        )
    )


def test_gradients_after_an_early_stop_are_those_of_the_minibatch_that_stopped_it(recordings: Recordings) -> None:
    settings = PPO | {"target_kl": 1e-4, "learning_rate": 1e-3, "recompute_advantages": False}
    recorded, eager = (recordings.train(compile=compiled, n=3, **settings) for compiled in (True, False))
    for ours, theirs in zip(recorded.policy.parameters(), eager.policy.parameters(), strict=True):
        assert th.allclose(ours.grad.cpu(), theirs.grad.cpu(), atol=1e-5)


def test_a_frozen_parameter_that_cannot_be_written_to_stays_as_it_is(recordings: Recordings) -> None:
    def freeze(model: Any) -> None:
        layer = model.policy.mlp_extractor.policy_net[0]
        layer.bias.requires_grad_(False)
        layer.bias.data = th.zeros(1, device=layer.bias.device).expand(len(layer.bias))

    recorded, eager = (recordings.train(compile=c, callback=_Replace(freeze), n=4, **PPO) for c in (True, False))
    assert "cannot be recorded" not in recorded.engine_report()
    assert_same(recorded, eager)


class _HalveInStep(BaseCallback):
    """Puts other tensors in the place of the policy's in the middle of a rollout."""

    def _on_step(self) -> bool:
        if self.n_calls == 100:
            for parameter in self.model.policy.parameters():
                parameter.data = parameter.data * 0.5
        return True


def test_parameters_replaced_in_a_rollout_act_from_the_next_step_on(recordings: Recordings) -> None:
    assert_same(*(recordings.train(compile=compiled, callback=_HalveInStep(), **PPO) for compiled in (True, False)))


def test_minibatches_that_lie_in_memory_otherwise_are_not_recorded(recordings: Recordings) -> None:
    class Transposed(TorchRolloutBuffer):
        def get(self, batch_size: Any = None, **kwargs: Any) -> Any:
            for batch in super().get(batch_size, **kwargs):
                yield batch._replace(observations=batch.observations.t().contiguous().t())

    settings = PPO | {"rollout_buffer_class": Transposed}
    assert_same(*(recordings.train(compile=compiled, **settings) for compiled in (True, False)))


def test_schedules_record_nothing_anew(recordings: Recordings) -> None:
    recordings.train(compile=True, n=6, **PPO, learning_rate="lin_1e-3", clip_range="lin_0.2", ent_coef="lin_0.01")
    assert len(recordings.functions) == 2


class _Replace(BaseCallback):
    """After some rollouts, puts other tensors in the places of what is trained, or other values in the same tensors."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        super().__init__()
        self.change, self.count = change, 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.count += 1
        if self.count == 2:
            self.change(self.model)


def _other_storage(model: Any) -> None:
    for parameter in model.policy.parameters():
        parameter.data = parameter.data.clone()


def _other_moments(model: Any) -> None:
    model.policy.optimizer.load_state_dict(copy.deepcopy(model.policy.optimizer.state_dict()))


def _other_values(model: Any) -> None:
    state = {name: value * 0.9 for name, value in model.policy.state_dict().items()}
    model.policy.load_state_dict(state)


def _other_function(model: Any) -> None:
    model.policy.mlp_extractor.policy_net[1] = th.nn.ReLU()


@pytest.mark.parametrize(
    ("change", "n_recordings"),
    [(_other_storage, 3), (_other_moments, 3), (_other_values, 2), (_other_function, 4)],
)
def test_what_changes_between_updates_is_noticed(
    recordings: Recordings, change: Callable[[Any], None], n_recordings: int
) -> None:
    models = [recordings.train(compile=compiled, n=4, callback=_Replace(change), **PPO) for compiled in (True, False)]
    assert len(recordings.functions) >= n_recordings
    assert_same(*models)


def test_a_model_that_was_loaded_goes_on_as_one_that_was_not(recordings: Recordings, tmp_path: Any) -> None:
    model = recordings.train(compile=True, **PPO)
    model.save(tmp_path / "model")
    env = make_vec_env("Pendulum-v1", N_ENVS, seed=0)
    loaded = [PPOPlus.load(tmp_path / "model", env=env, device=recordings.device, compile=c) for c in (True, False)]
    for each in loaded:
        each.set_env(make_vec_env("Pendulum-v1", N_ENVS, seed=7))
        each.set_random_seed(1)
        each.learn(2 * 64 * N_ENVS, reset_num_timesteps=False)
    assert_same(*loaded)


@pytest.mark.parametrize(
    ("algorithm", "settings", "units"),
    [
        (PPOPlus, PPO, ["update", "policy step"]),
        (TRPOPlus, {"n_steps": 64, "batch_size": 32}, ["critic update", "policy step", "Fisher product"]),
    ],
)
def test_where_recording_fails_training_goes_on_eagerly_and_the_report_says_why(
    recordings: Recordings,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: Any,
    settings: dict[str, Any],
    units: list[str],
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(device_graphs.RECORDERS, recordings.device, fail)
    recorded = recordings.train(algorithm, compile=True, **settings)
    report = recorded.engine_report()
    for unit in units:
        assert f"{unit}: eager, it cannot be recorded for the device: out of memory" in report
    assert_same(recorded, recordings.train(algorithm, compile=False, **settings))


def test_fisher_products_are_of_the_parameters_and_states_of_the_update(recordings: Recordings) -> None:
    model = recordings.train(TRPOPlus, n=1, n_steps=64, batch_size=32, compile=True)
    actor = [*model.policy.mlp_extractor.policy_net.parameters(), *model.policy.action_net.parameters()]

    def eager(observations: th.Tensor) -> Any:
        return fisher_vector_product(*fisher_outputs(model.policy.get_distribution(observations)), actor)

    v = th.linspace(-1, 1, sum(parameter.numel() for parameter in actor), device=recordings.device)
    model.policy.set_training_mode(False)
    first, second = (th.randn(64 * N_ENVS, 3, device=recordings.device) for _ in range(2))
    engine = model._engine
    before = engine.fisher_product(model.policy, first, actor, lambda: eager(first))
    products = [before(v)]
    with th.no_grad():
        actor[0].mul_(1.5)
    after = engine.fisher_product(model.policy, second, actor, lambda: eager(second))
    products += [after(v), before(v), after(v)]  # what two functions have in common is not mixed up
    n_functions = 1 + 2 + 1  # of the training, and this one has fewer parameters
    assert len(recordings.functions) == n_functions
    expected = [eager(second)(v)]
    with th.no_grad():
        actor[0].div_(1.5)
    expected = [eager(first)(v), *expected]
    for product, wanted in zip(products, [*expected, *expected], strict=True):
        assert th.allclose(product, wanted, rtol=1e-4, atol=1e-6)


def test_an_optimiser_without_a_rule_steps_itself(recordings: Recordings) -> None:
    settings = PPO | {"policy_kwargs": {"optimizer_class": th.optim.SGD}}
    assert_same(recordings.train(compile=True, **settings), recordings.train(compile=False, **settings))


@pytest.fixture
def tensors(recordings: Recordings) -> Iterator[Callable[..., th.Tensor]]:
    yield lambda *values: th.tensor(values, device=recordings.device)


def test_a_recorded_call_reads_fixed_tensors_where_they_are_and_gives_new_ones(tensors: Any) -> None:
    weight = tensors(2.0)
    call = RecordedCall(lambda x: [x[0] * x[1]], [weight, tensors(3.0)], n_fixed=1)
    (first,) = call([weight, tensors(5.0)])
    weight.fill_(4.0)
    (second,) = call([weight, tensors(5.0)])
    assert first.tolist() == [10.0]  # 2 · 5, and stays so
    assert second.tolist() == [20.0]  # 4 · 5
    assert call.is_of([weight])
    assert not call.is_of([weight.clone()])


def test_what_is_recorded_lies_in_memory_as_its_examples_do(tensors: Any) -> None:
    strides = []
    spread = tensors(*range(8)).view(4, 2)[::2]
    call = RecordedCall(lambda x: strides.append(x[0].stride()) or [x[0] * 2], [spread], n_fixed=0)
    assert set(strides) == {spread.stride()} == {(4, 1)}
    assert call([spread + 1])[0].tolist() == [[2, 4], [10, 12]]


def test_a_recorded_loop_goes_through_minibatches_and_leaves_no_trace_of_its_recording(tensors: Any) -> None:
    # θ ← θ + n Σx for each minibatch, as long as θ is below the limit in `control`; it gives θ before.
    def update(inputs: list[th.Tensor]) -> list[th.Tensor]:
        theta, batch, numbers, control, count = inputs
        found = theta.double().clone()
        theta.copy_(th.where(theta < control[0], theta + numbers[0].float() * batch.sum(), theta))
        count.add_(1)
        return [found]

    theta, count, samples = tensors(0.0), tensors(0.0), tensors(1.0, 2.0, 3.0, 4.0)
    loop = RecordedLoop(update, [theta], [samples[:2]], 4, 2, [1.0], [100.0], [count], n_results=1)
    assert (theta.item(), count.item()) == (0.0, 0.0)
    rows = np.array([[0, 1], [2, 3], [0, 3]])
    # 10 · (1 + 2) = 30, + 10 · (3 + 4) = 100, which is not below 100.
    assert loop.run([samples], rows, [10.0], [100.0]).flatten().tolist() == [0.0, 30.0, 100.0]
    assert (theta.item(), count.item()) == (100.0, 3.0)
    # Other samples, numbers and limits, and fewer minibatches than there is room for: 100 + 1 · (2 + 2).
    assert loop.run([samples * 2], np.array([[0, 0]]), [1.0], [1000.0]).tolist() == [[100.0]]
    assert theta.item() == 104.0


def test_reading_a_value_is_refused_by_the_recorder(recordings: Recordings, tensors: Any) -> None:
    if recordings.device == "cuda":
        pytest.skip("a recording that fails leaves torch's allocator in the middle of it")
    with pytest.raises(AssertionError, match="looks at a value"):
        device_graphs.record(lambda: float(tensors(1.0).sum()), [tensors(1.0)])
