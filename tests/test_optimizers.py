"""The lean step: the same bits as ``optimizer.step()``, and that very method wherever somebody may be watching."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch as th
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sb3_pgplus.optimizers import StepRule, common_base, drop_gradients, fuse, joined, step, zero_grad

SHAPES = [(4, 3), (4,), (1, 4), ()]


def parameters(seed: int = 0) -> list[th.nn.Parameter]:
    rng = th.Generator().manual_seed(seed)
    return [th.nn.Parameter(th.randn(shape, generator=rng)) for shape in SHAPES]


def set_gradients(optimizer: th.optim.Optimizer, seed: int, without: tuple[int, ...] = ()) -> None:
    rng = th.Generator().manual_seed(100 + seed)
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        gradient = th.randn(p.shape, generator=rng)
        p.grad = None if i in without else gradient


def fused_adam(**settings: Any) -> th.optim.Adam:
    """Adam as the package sets it up, after its first step."""
    optimizer = th.optim.Adam(parameters(), **{"lr": 1e-2, "eps": 1e-5, **settings})
    fuse(optimizer)
    set_gradients(optimizer, 0)
    step(optimizer)
    return optimizer


def tensors(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    """All parameters and all of the optimiser's state."""
    found = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    for state in optimizer.state_dict()["state"].values():
        found += [state[name] for name in sorted(state)]
    return found


def assert_same(actual: th.optim.Optimizer, expected: th.optim.Optimizer) -> None:
    assert actual.state_dict()["param_groups"] == expected.state_dict()["param_groups"]
    pairs = list(zip(tensors(actual), tensors(expected), strict=True))
    assert len(pairs) > len(SHAPES)
    assert all(th.equal(x, y) for x, y in pairs)


@pytest.fixture
def adam_calls(monkeypatch: pytest.MonkeyPatch) -> list[th.optim.Optimizer]:
    """Who called ``Adam.step``."""
    calls, original = list[th.optim.Optimizer](), th.optim.Adam.step

    def recorded(self: th.optim.Adam, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(th.optim.Adam, "step", recorded)
    return calls


def test_a_plain_rmsprop_steps_with_the_bits_of_torchs_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = th.optim.RMSprop(parameters(), lr=1e-2, alpha=0.9, eps=1e-5)
    for i, without in enumerate([(), (), (1,), (), (0, 2, 3), (0, 1, 2, 3), ()]):
        set_gradients(ours, i, without)
        reference = copy.deepcopy(ours)
        set_gradients(reference, i, without)
        reference.step()
        with monkeypatch.context() as patch:
            if i > 0:  # the first step makes the state
                patch.delattr(th.optim.RMSprop, "step")
            step(ours)
        assert_same(ours, reference)


@pytest.mark.parametrize(
    "settings", [{"momentum": 0.9}, {"centered": True}, {"weight_decay": 0.1}, {"maximize": True}, {"foreach": False}]
)
def test_other_rmsprops_step_by_the_method(settings: dict[str, Any]) -> None:
    ours = th.optim.RMSprop(parameters(), lr=1e-2, **settings)
    calls: list[int] = []
    for i in range(3):
        set_gradients(ours, i)
        reference = copy.deepcopy(ours)
        set_gradients(reference, i)
        reference.step()
        ours.step = lambda: calls.append(1) or type(ours).step(ours)  # type: ignore[method-assign,func-returns-value]  # to see the call
        step(ours)
        del ours.step
        assert_same(ours, reference)
    assert len(calls) == 3


# --- fuse -------------------------------------------------------------------------------------------------------------


class MyAdam(th.optim.Adam):
    pass


def test_fuse_chooses_the_fused_kernel_of_plain_adam() -> None:
    optimizer = th.optim.Adam(parameters(), lr=1e-2)
    groups = copy.deepcopy(optimizer.param_groups)
    fuse(optimizer)
    assert [group.pop("fused") for group in (*optimizer.param_groups, *groups)] == [True, None]
    # and nothing else
    assert optimizer.param_groups[0].keys() == groups[0].keys()
    assert all(optimizer.param_groups[0][name] == groups[0][name] for name in groups[0] if name != "params")


@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [
        (th.optim.AdamW, {}),
        (th.optim.RMSprop, {}),
        (th.optim.SGD, {}),
        (MyAdam, {}),
        (th.optim.Adam, {"foreach": True}),
        (th.optim.Adam, {"foreach": False}),
        (th.optim.Adam, {"fused": False}),
        (th.optim.Adam, {"amsgrad": True}),
        (th.optim.Adam, {"capturable": True}),
        (th.optim.Adam, {"differentiable": True}),
    ],
)
def test_fuse_leaves_other_optimizers_and_the_choices_of_users_alone(
    optimizer_class: type[th.optim.Optimizer], settings: dict[str, Any]
) -> None:
    optimizer = optimizer_class(parameters(), **{"lr": 1e-2, **settings})  # type: ignore[call-arg]
    before = copy.deepcopy(optimizer.state_dict())
    fuse(optimizer)
    assert optimizer.state_dict() == before


def laid_out(name: str) -> th.nn.Parameter:
    """One matrix in three layouts."""
    matrix = th.randn((4, 6), generator=th.Generator().manual_seed(7))
    wide = th.zeros(4, 12)
    wide[:, ::2] = matrix
    layouts = {"plain": matrix.clone(), "transposed": matrix.T.contiguous().T, "with gaps": wide[:, ::2]}
    return th.nn.Parameter(layouts[name])


@pytest.mark.parametrize("layout", ["transposed", "with gaps"])
@pytest.mark.parametrize("when", ["from the start", "later"])
def test_adam_steps_alike_however_a_parameter_lies_in_memory(layout: str, when: str) -> None:
    # A fused kernel goes through memory, where a transposed matrix has its elements in another order than its gradient.
    found = []
    for name in ("plain", layout):
        parameter = laid_out("plain" if when == "later" else name)
        optimizer = th.optim.Adam([parameter], lr=1e-2)
        fuse(optimizer)
        for i in range(4):
            if i == 2:
                moved = laid_out(name).data.copy_(parameter.data)
                parameter.grad, parameter.data = None, moved
            parameter.grad = th.randn((4, 6), generator=th.Generator().manual_seed(i))
            step(optimizer)
        found.append(parameter.detach().clone())
    th.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


def test_a_parameter_that_is_laid_out_like_all_that_belongs_to_it_stays_fused() -> None:
    parameter = laid_out("transposed")
    optimizer = th.optim.Adam([parameter], lr=1e-2)
    fuse(optimizer)
    parameter.grad = th.ones(6, 4).T
    step(optimizer)
    step(optimizer)
    assert optimizer.param_groups[0]["fused"] is True


def test_an_optimizers_own_way_to_forget_gradients_is_respected() -> None:
    class Keeping(th.optim.Adam):
        def zero_grad(self, set_to_none: bool = True) -> None:
            pass

    for kind, is_kept in ((th.optim.Adam, False), (Keeping, True)):
        optimizer, other = kind(parameters()), parameters(1)[0]
        set_gradients(optimizer, 0)
        other.grad = th.ones_like(other)
        zero_grad(optimizer, besides=[other])
        assert [p.grad is not None for p in (*optimizer.param_groups[0]["params"], other)] == [is_kept] * 5


def test_fuse_decides_for_each_group() -> None:
    a, b, c = parameters()[:3]
    complex_number = th.nn.Parameter(th.ones(2, dtype=th.complex64))
    groups = [{"params": [a]}, {"params": [b], "foreach": True}, {"params": [c, complex_number]}]
    optimizer = th.optim.Adam(groups, lr=1e-2)
    fuse(optimizer)
    assert [group["fused"] for group in optimizer.param_groups] == [True, None, None]


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"maximize": True}])
def test_the_fused_kernel_computes_what_the_loop_does(settings: dict[str, Any]) -> None:
    loop = th.optim.Adam(parameters(), lr=1e-2, **settings)
    optimizer = th.optim.Adam(parameters(), lr=1e-2, **settings)
    fuse(optimizer)
    for i in range(10):
        for each in (loop, optimizer):
            set_gradients(each, i)
        loop.step()
        step(optimizer)
    for x, y in zip(tensors(optimizer), tensors(loop), strict=True):
        th.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# --- step -------------------------------------------------------------------------------------------------------------

ADAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight_decay": {"weight_decay": 0.1},
    "decoupled_weight_decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True},
    "betas": {"betas": (0.5, 0.7), "eps": 1e-2},
}


@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("name", ADAMS)
def test_steps_have_the_bits_of_the_method(name: str, n_groups: int, adam_calls: list[th.optim.Optimizer]) -> None:
    """Over several steps with another learning rate in each, some gradients missing, all missing once."""
    ours = parameters()
    groups = (
        [{"params": ours}] if n_groups == 1 else [{"params": ours[:2]}, {"params": ours[2:], "lr": 0.1, "eps": 0.1}]
    )
    optimizer = th.optim.Adam(groups, **{"lr": 1e-2, **ADAMS[name]})
    fuse(optimizer)
    for i, without in enumerate([(), (), (1,), (), (0, 2, 3), (0, 1, 2, 3), (2, 3), ()]):
        set_gradients(optimizer, i, without)
        reference = copy.deepcopy(optimizer)
        # deepcopy drops gradients of parameters that it copies along with the optimiser
        set_gradients(reference, i, without)
        reference.step()
        before = [p.detach().clone() for p in ours]
        step(optimizer)
        assert_same(optimizer, reference)
        moved = [not th.equal(p, old) for p, old in zip(ours, before, strict=True)]
        assert moved == [j not in without for j in range(len(ours))]
        for group in optimizer.param_groups:
            group["lr"] *= 0.7
    # the method itself ran at the first step alone, which makes the state
    assert [call for call in adam_calls if call is optimizer] == [optimizer]


def test_the_method_makes_the_state_of_parameters_that_get_their_first_gradient_late(
    adam_calls: list[th.optim.Optimizer],
) -> None:
    optimizer = th.optim.Adam(parameters(), lr=1e-2)
    fuse(optimizer)
    calls = []
    for i, without in enumerate([(0, 1), (0, 1), (0,), (), ()]):
        set_gradients(optimizer, i, without)
        reference = copy.deepcopy(optimizer)
        set_gradients(reference, i, without)
        adam_calls.clear()
        step(optimizer)
        calls.append(len(adam_calls))
        reference.step()
        assert_same(optimizer, reference)
    assert calls == [1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [
        (th.optim.RMSprop, {"alpha": 0.9}),
        (th.optim.SGD, {"momentum": 0.9}),
        (th.optim.AdamW, {"weight_decay": 0.1}),
        (th.optim.AdamW, {"fused": True}),
        (th.optim.Adam, {"amsgrad": True}),
        (th.optim.Adam, {"amsgrad": True, "fused": True}),
        (th.optim.Adam, {"foreach": True}),
        (MyAdam, {"fused": True}),
    ],
)
def test_other_optimizers_step_by_their_method(
    optimizer_class: type[th.optim.Optimizer], settings: dict[str, Any]
) -> None:
    optimizer = optimizer_class(parameters(), **{"lr": 1e-2, **settings})  # type: ignore[call-arg]
    reference = optimizer_class(parameters(), **{"lr": 1e-2, **settings})  # type: ignore[call-arg]
    fuse(optimizer)
    for i in range(4):
        set_gradients(optimizer, i)
        set_gradients(reference, i)
        step(optimizer)
        reference.step()
        assert_same(optimizer, reference)


@pytest.fixture(params=["pre", "post", "global_pre", "global_post"])
def hooked(request: pytest.FixtureRequest) -> Iterator[tuple[th.optim.Adam, list[Any]]]:
    optimizer, seen = fused_adam(), list[Any]()

    def hook(*args: Any) -> None:
        seen.append(args[0])

    register = {
        "pre": optimizer.register_step_pre_hook,
        "post": optimizer.register_step_post_hook,
        "global_pre": register_optimizer_step_pre_hook,
        "global_post": register_optimizer_step_post_hook,
    }[request.param]
    handle = register(hook)
    yield optimizer, seen
    handle.remove()


def test_hooks_of_a_step_are_called(hooked: tuple[th.optim.Adam, list[Any]]) -> None:
    optimizer, seen = hooked
    reference = fused_adam()
    for i in range(1, 4):
        set_gradients(optimizer, i)
        set_gradients(reference, i)
        step(optimizer)
        assert [each for each in seen if each is optimizer] == [optimizer] * i
        reference.step()
        assert_same(optimizer, reference)


def test_a_scheduler_notices_the_step() -> None:
    """It wraps the method to warn those who forget to call it."""
    optimizer = fused_adam()
    scheduler = ExponentialLR(optimizer, gamma=0.5)
    set_gradients(optimizer, 1)
    step(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5e-2


def test_a_replaced_method_is_called() -> None:
    optimizer, calls = fused_adam(), list[str]()
    optimizer.step = lambda: calls.append("replaced")  # type: ignore[assignment,method-assign,return-value]
    set_gradients(optimizer, 1)
    step(optimizer)
    assert calls == ["replaced"]


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_drop_gradients_sets_all_of_them_to_none() -> None:
    ours = parameters()
    optimizer = th.optim.Adam([{"params": ours[:1]}, {"params": ours[1:]}])
    set_gradients(optimizer, 0, without=(2,))
    assert [p.grad is None for p in ours] == [False, False, True, False]
    drop_gradients(optimizer)
    assert all(p.grad is None for p in ours)


@pytest.mark.parametrize("fused", [None, False])
def test_a_stock_adam_goes_on_from_the_saved_state(fused: bool | None) -> None:
    """With the kernel that was saved the bits are the same; by SB3's loop the numbers are."""
    optimizer = fused_adam()
    for i in range(1, 4):
        set_gradients(optimizer, i)
        step(optimizer)
    fresh = th.optim.Adam(copy.deepcopy(optimizer.param_groups[0]["params"]), lr=1.0)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(fresh, optimizer)
    if fused is False:
        fresh.param_groups[0]["fused"] = False
    for i in range(4, 8):
        set_gradients(optimizer, i)
        set_gradients(fresh, i)
        step(optimizer)
        fresh.step()
    for x, y in zip(tensors(fresh), tensors(optimizer), strict=True):
        th.testing.assert_close(x, y, rtol=0 if fused is None else 1e-5, atol=0 if fused is None else 1e-6)


# --- steps as functions of tensors ------------------------------------------------------------------------------------

RULES: dict[str, Callable[[list[Any]], th.optim.Optimizer]] = {
    "RMSprop": lambda ps: th.optim.RMSprop(ps, lr=1e-2, alpha=0.9, eps=1e-5),
    "RMSprop, two rates": lambda ps: th.optim.RMSprop([{"params": ps[:1], "lr": 0.1}, {"params": ps[1:]}], alpha=0.5),
    "Adam": lambda ps: th.optim.Adam(ps, lr=1e-2, betas=(0.8, 0.95), eps=1e-5, fused=True),
    "Adam, two rates": lambda ps: th.optim.Adam([{"params": ps[:1], "lr": 0.1}, {"params": ps[1:]}], fused=True),
}


def step_by(rule: StepRule, parameters: list[Any]) -> None:
    """What the compiled update does with a rule."""
    with th.no_grad():
        numbers = [th.tensor(number, dtype=th.float64) for number in rule.numbers()]
        gradient = th.cat([p.grad.flatten() for p in parameters])
        new = rule.stepped(parameters, gradient, rule.states(), numbers)
        for old, value in zip([*parameters, *rule.states()], new, strict=True):
            old.copy_(value)


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_a_rules_steps_are_those_of_its_optimizer(make: Callable[[list[Any]], th.optim.Optimizer]) -> None:
    """The optimiser's own steps may come between, and its state may be loaded: the rule goes on from there."""
    ours, theirs = make(parameters()), make(parameters())
    ps = [p for group in ours.param_groups for p in group["params"]]
    rule = StepRule.of(ours, ps)  # without any state yet
    for i in range(8):
        set_gradients(ours, i)
        set_gradients(theirs, i)
        theirs.step()
        if i in (2, 3):
            step(ours)
            continue
        if i == 5:
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
            rule = StepRule.of(ours, ps)
        assert rule is not None
        step_by(rule, ps)
        for x, y in zip(tensors(ours), tensors(theirs), strict=True):
            th.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert [state.keys() for state in ours.state.values()] == [state.keys() for state in theirs.state.values()]


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_a_rule_for_some_follows_one_for_all(make: Callable[[list[Any]], th.optim.Optimizer]) -> None:
    """As the critic's own epochs follow those of both; then counters differ, which no rule of Adam expresses."""
    ours, theirs = make(parameters()), make(parameters())
    ps, theirs_ps = ([p for group in each.param_groups for p in group["params"]] for each in (ours, theirs))
    for first in (0, 0, 1, 1):
        set_gradients(ours, first)
        set_gradients(theirs, first)
        for p in theirs_ps[:first]:
            p.grad = None
        rule = StepRule.of(ours, ps[first:])
        assert rule is not None
        step_by(rule, ps[first:])
        theirs.step()
        for x, y in zip(tensors(ours), tensors(theirs), strict=True):
            th.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert (StepRule.of(ours, ps) is None) == isinstance(ours, th.optim.Adam)


def _move_data(optimizer: th.optim.Optimizer, ps: list[Any]) -> None:
    ps[1].data = ps[1].data.clone()


def _forget_a_state(optimizer: th.optim.Optimizer, ps: list[Any]) -> None:
    del optimizer.state[ps[1]]


def _reset_moments(optimizer: th.optim.Optimizer, ps: list[Any]) -> None:
    state = optimizer.state[ps[0]]
    for name in state.keys() - {"step"}:
        state[name] = th.zeros_like(state[name])


def _reset_moments_data(optimizer: th.optim.Optimizer, ps: list[Any]) -> None:
    state = optimizer.state[ps[0]]
    for name in state.keys() - {"step"}:
        state[name].data = th.zeros_like(state[name])


CHANGES: dict[str, Callable[[th.optim.Optimizer, list[Any]], object]] = {
    "a loaded state": lambda optimizer, _: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "a forgotten state": _forget_a_state,
    "a cleared state": lambda optimizer, ps: optimizer.state[ps[0]].clear(),
    "another counter": lambda optimizer, ps: optimizer.state[ps[0]].update(step=th.tensor(0)),
    "other moments": _reset_moments,
    "moments elsewhere": _reset_moments_data,
    "another setting": lambda optimizer, _: optimizer.param_groups[0].update(eps=1e-3),
    "a rate that is a tensor": lambda optimizer, _: optimizer.param_groups[0].update(lr=th.tensor(1e-2)),
    "a parameter more": lambda optimizer, _: optimizer.add_param_group({"params": [th.nn.Parameter(th.zeros(2))]}),
    "a parameter less": lambda optimizer, _: optimizer.param_groups[0]["params"].pop(),
    "a hook": lambda optimizer, _: optimizer.register_step_pre_hook(lambda *_: None),
    "other memory": _move_data,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_a_rule_holds_until_something_it_depends_on_changes(
    make: Callable[[list[Any]], th.optim.Optimizer], change: Callable[[th.optim.Optimizer, list[Any]], object]
) -> None:
    optimizer = make(parameters())
    ps = [p for group in optimizer.param_groups for p in group["params"]]
    rule = StepRule.of(optimizer, ps)
    assert rule is not None
    for i in range(2):
        set_gradients(optimizer, i)
        step_by(rule, ps)
        optimizer.param_groups[0]["lr"] *= 0.5  # comes as a number
        assert rule.still_holds(optimizer)
    assert not rule.still_holds(make(parameters()))
    change(optimizer, ps)
    assert not rule.still_holds(optimizer)


def test_a_rule_notices_a_setting_that_is_changed_in_place() -> None:
    optimizer = fused_adam()
    optimizer.param_groups[0]["betas"] = [0.9, 0.999]
    rule = StepRule.of(optimizer, optimizer.param_groups[0]["params"])
    assert rule is not None
    rule.states()
    assert rule.still_holds(optimizer)
    optimizer.param_groups[0]["betas"][0] = 0.5
    assert not rule.still_holds(optimizer)


def test_a_rule_of_adam_ends_where_only_some_of_its_parameters_are_stepped() -> None:
    optimizer = fused_adam()
    ps = optimizer.param_groups[0]["params"]
    rule = StepRule.of(optimizer, ps)
    assert rule is not None
    rule.states()
    assert rule.still_holds(optimizer)
    set_gradients(optimizer, 1, without=(0,))
    step(optimizer)
    assert not rule.still_holds(optimizer)


def test_rules_that_take_turns_find_the_states_where_the_other_put_them() -> None:
    ours, theirs = (th.optim.RMSprop(parameters(), lr=1e-2) for _ in range(2))
    ps = ours.param_groups[0]["params"]
    rules = [StepRule.of(ours, ps), StepRule.of(ours, ps[::-1])]
    for i in range(4):
        set_gradients(ours, i)
        set_gradients(theirs, i)
        rule = rules[i % 2]
        assert rule is not None
        step_by(rule, ps[:: 1 - 2 * (i % 2)])
        theirs.step()
    for x, y in zip(tensors(ours), tensors(theirs), strict=True):
        th.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_a_group_that_is_added_makes_another_rule() -> None:
    """A trace knows numbers by their places, and a further group has a number of its own."""
    ps = [p for group in fused_adam().param_groups for p in group["params"]]
    optimizer = th.optim.Adam(ps, fused=True)
    before = StepRule.of(optimizer, ps)
    assert before is not None
    n_numbers = len(before.numbers())
    optimizer.add_param_group({"params": [th.nn.Parameter(th.zeros(2))], "lr": 5.0})
    after = StepRule.of(optimizer, ps)
    assert after is not None
    assert before.key != after.key
    assert len(after.numbers()) == n_numbers + 1


def test_gradients_of_some_parameters_can_be_kept() -> None:
    optimizer = th.optim.Adam(parameters())
    set_gradients(optimizer, 0)
    first, *others = optimizer.param_groups[0]["params"]
    drop_gradients(optimizer, besides=[first])
    assert first.grad is not None
    assert all(p.grad is None for p in others)


def test_joined_states_are_views_of_one_vector_with_their_values() -> None:
    """Two states of 2 and 1×3 elements make a vector of 5; joining again finds it, another order makes a new one."""
    states: list[dict[str, Any]] = [{"m": th.tensor([1.0, 2.0])}, {"m": th.tensor([[3.0, 4.0, 5.0]])}]
    vector = joined(states, "m")
    assert vector.tolist() == [1, 2, 3, 4, 5]
    assert joined(states, "m") is vector
    vector += 1
    assert [state["m"].tolist() for state in states] == [[2, 3], [[4, 5, 6]]]
    other = joined(states[::-1], "m")
    assert other.tolist() == [4, 5, 6, 2, 3]
    assert joined(states[::-1], "m") is other


def test_a_part_of_a_vector_is_no_common_base() -> None:
    vector = th.arange(5.0)
    first, second = vector.split([2, 3])
    assert common_base([first, second]) is vector
    assert common_base([first]) is None
    assert common_base([second, first]) is None
    assert common_base([first, None]) is None
    assert common_base([th.zeros(2)]) is None


def test_a_view_whose_data_was_replaced_has_no_common_base() -> None:
    """As ``module.double().float()`` replaces it: torch still names the vector as its base."""
    vector = th.arange(3.0)
    view = vector.view(3)
    assert common_base([view]) is vector
    view.data = view.data.double().float()
    assert view._base is vector
    assert common_base([view]) is None


def test_a_rule_makes_states_only_for_parameters_that_are_stepped() -> None:
    optimizer = th.optim.RMSprop(parameters())
    first, *others = optimizer.param_groups[0]["params"]
    assert StepRule.of(optimizer, [first]) is not None
    assert set(optimizer.state) == {first}
    assert all(p not in optimizer.state for p in others)


NO_RULE: dict[str, Callable[[list[Any]], th.optim.Optimizer]] = {
    "another kind": lambda ps: th.optim.SGD(ps, lr=0.1),
    "a subclass": lambda ps: type("Own", (th.optim.RMSprop,), {})(ps),
    "torch's loop": lambda ps: th.optim.Adam(ps),
    "weight decay": lambda ps: th.optim.Adam(ps, fused=True, weight_decay=0.1),
    "upwards": lambda ps: th.optim.Adam(ps, fused=True, maximize=True),
    "the largest of the past": lambda ps: th.optim.Adam(ps, fused=True, amsgrad=True),
    "momentum": lambda ps: th.optim.RMSprop(ps, momentum=0.9),
    "a rate that is a tensor": lambda ps: th.optim.RMSprop(ps, lr=th.tensor(0.1)),
    "groups of two kinds": lambda ps: th.optim.RMSprop([{"params": ps[:1], "alpha": 0.5}, {"params": ps[1:]}]),
    "another layout": lambda ps: th.optim.Adam([th.nn.Parameter(th.zeros(2, 3).T)], fused=True),
    "two precisions": lambda ps: th.optim.Adam([*ps, th.nn.Parameter(th.zeros(2, dtype=th.float64))], fused=True),
}


@pytest.mark.parametrize("make", NO_RULE.values(), ids=NO_RULE)
def test_optimizers_that_step_otherwise_have_no_rule(make: Callable[[list[Any]], th.optim.Optimizer]) -> None:
    optimizer = make(parameters())
    assert StepRule.of(optimizer, [p for group in optimizer.param_groups for p in group["params"]]) is None
    assert not optimizer.state


def test_a_parameter_that_the_optimizer_does_not_know_has_no_rule() -> None:
    assert StepRule.of(th.optim.RMSprop(parameters()), [th.nn.Parameter(th.zeros(2))]) is None


@pytest.mark.parametrize("kind", [th.optim.Adam, th.optim.RMSprop])
def test_an_eager_step_of_two_groups_counts_in_the_vector_that_a_rule_has_joined(kind: Any) -> None:
    parameters = [th.nn.Parameter(th.ones(2)), th.nn.Parameter(th.ones(3))]
    optimizer = kind([{"params": [p]} for p in parameters], lr=0.1)
    fuse(optimizer)
    rule = StepRule.of(optimizer, parameters)
    assert rule is not None
    counts = rule.states()[0]
    for n in (1, 2):
        for parameter in parameters:
            parameter.grad = th.ones_like(parameter)
        step(optimizer)
        assert counts.tolist() == [n, n]
    assert rule.still_holds(optimizer)  # nothing has to be joined or recorded again
