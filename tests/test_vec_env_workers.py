"""Environments in worker processes: the same numbers as DummyVecEnv, and nothing left behind whatever happens."""

import copy
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from vec_env_cases import (
    CASES,
    Scripted,
    ScriptedDict,
    assert_plays_like_sb3,
    assert_same,
    monitored,
    oracle,
    play,
    registered,
    scripted,
)

from sb3_pgplus.errors import WorkerError
from sb3_pgplus.vec_env import WorkersVecEnv

HANGS = 3.0  # a timeout for tests: starting an environment counts, too


class Breaks(Scripted):
    """Breaks in its third step, or where else it is told to."""

    def __init__(self, how: str = "", where: str = "step") -> None:
        super().__init__((10,))
        self.how, self.where = how, where
        if where == "constructor":
            self.break_now()

    def break_now(self) -> None:
        if self.how == "raise":
            raise ZeroDivisionError("the robot fell apart")
        if self.how == "leave":
            sys.exit(4)
        if self.how == "exit":
            os._exit(3)
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hang":
            time.sleep(100)

    def reset(self, **kwargs):
        if self.where == "reset":
            self.break_now()
        return super().reset(**kwargs)

    def step(self, action):
        if self.where == "step" and self.steps == 2:
            self.break_now()
        return super().step(action)


class LeavesOnClosing(Scripted):
    """Ends the process where it should only close, as programs with a window do, or says that it was closed."""

    def __init__(self, says: str = "") -> None:
        super().__init__((10,))
        self.says = says

    def close(self):
        if not self.says:
            sys.exit(1)
        Path(self.says).write_text("closed")


class Speaks(Scripted):
    observation_space = gym.spaces.Text(5)


class StartsPrograms(Scripted):
    """Starts a program, as simulators are, and ends it or not."""

    def __init__(self, ends: str = "", breaks: bool = False) -> None:
        super().__init__((10,))
        self.ends, self.breaks = ends, breaks
        self.program = subprocess.Popen(["sleep", "300"])

    def pid(self):
        return self.program.pid

    def step(self, action):
        if self.breaks:
            raise ConnectionError("the simulator is lost")
        return super().step(action)

    def close(self):
        if self.breaks:
            raise ConnectionError("nobody to say goodbye to")
        if self.ends:
            self.program.terminate()
            self.program.wait()
            Path(self.ends).write_text("ended")


class Chained(gym.Wrapper):
    """Makes one episode of two, around the Monitor that knows of both."""

    def reset(self, **kwargs):
        self.is_second = False
        return super().reset(**kwargs)

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if (terminated or truncated) and not self.is_second:
            self.is_second = True
            observation, _ = super().reset()
            return observation, reward, False, False, info
        return observation, reward, terminated, truncated, info


class UnsendableError(Exception):
    """Is made of two arguments and holds a lock."""

    def __init__(self, first, second):
        super().__init__(first)
        self.lock = threading.Lock()


class RaisesUnsendable(Scripted):
    def complain(self):
        raise UnsendableError("out of oil", 1)


class Echo(gym.Env):
    """Observes the type, shape and sum of its action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(3), {}

    def step(self, action):
        return np.array([action.dtype.itemsize, action.ndim, action.sum()]), 0.0, False, False, {}


@pytest.fixture(scope="module", autouse=True)
def workers_start_fast():
    """The server that workers are forked from imports everything once, if no other test has started it yet."""
    multiprocessing.set_forkserver_preload(["sb3_pgplus.vec_env.worker_process"])


@pytest.fixture
def build():
    """Make a WorkersVecEnv, and check at the end that its processes are gone."""
    made: list[WorkersVecEnv] = []

    def make(*args, **kwargs):
        made.append(WorkersVecEnv(*args, **kwargs))
        return made[-1]

    yield make
    for env in made:
        env.close()
        assert not any(process.is_alive() for process in env._processes)


def breaking(how, where="step", at=3, n_envs=4):
    return [lambda i=i: Breaks(how if i == at else "", where) for i in range(n_envs)]


def shared_memory(pid):
    """The observations' memory among what a process has mapped."""
    maps = Path(f"/proc/{pid}/maps")
    if not maps.exists():
        pytest.skip("the memory map of a process is not in /proc on this system")
    return [line for line in maps.read_text().splitlines() if "sb3_pgplus" in line and "memfd" in line]


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pids, seconds=8.0):
    deadline = time.monotonic() + seconds
    while (alive := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


# --- the same numbers as SB3 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_workers_play_bit_for_bit_like_dummy_vec_env(case, build):
    fns = CASES[case]()
    assert_plays_like_sb3(build(monitored(fns), n_workers=2), fns, full_infos=False)


@pytest.mark.parametrize("n_workers", [1, 3, 9])
def test_the_number_of_workers_changes_nothing(n_workers, build):
    fns = scripted((3, 1), (4,), (2, 5), (1,), (6,), cls=ScriptedDict)
    env = build(monitored(fns), n_workers=n_workers, full_infos=True)
    assert len(env._processes) == min(n_workers, 5)
    assert_plays_like_sb3(env, fns, full_infos=True)


def test_forked_workers_play_the_same(build):
    fns = scripted((3, 1), (4,))
    assert_plays_like_sb3(build(monitored(fns), n_workers=2, start_method="fork"), fns, full_infos=False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8])
def test_environments_get_actions_in_the_type_they_were_given_in(dtype, build):
    actions = np.array([[0.1, 0.2], [1, 0]]).astype(dtype)
    ours, theirs = build([Echo, Echo], n_workers=1), DummyVecEnv([Echo, Echo])
    for env in (ours, theirs):
        env.reset()
    assert_same(ours.step(actions)[0], theirs.step(actions)[0])


def test_actions_that_do_not_fit_are_refused_and_do_no_harm(build):
    env = build(scripted((3,), (3,)), n_workers=1)
    env.reset()
    for actions in (np.zeros((3, 2)), np.zeros((2, 7)), np.array([None, None])):
        with pytest.raises(ValueError, match="2 actions of Box"):
            env.step(actions)
    env.step(np.zeros((2, 2)))


def test_options_and_seeds_reach_the_environments_once(build):
    env, other = build(scripted((3,), (3,), (3,)), n_workers=2), DummyVecEnv(scripted((3,), (3,), (3,)))
    for each in (env, other):
        each.set_options([{"option": i} for i in range(3)])
        each.seed(8)
    assert_same(env.reset(), other.reset())
    assert [info["option"] for info in env.reset_infos] == [0, 1, 2]
    assert_same(env.reset(), other.reset())
    assert [info["option"] for info in env.reset_infos] == [0, 0, 0]


def test_returned_arrays_stay_what_they_were(build):
    env = build(scripted((3,), (3,)), n_workers=1)
    first = env.reset()
    kept, (observations, rewards, dones, _) = first.copy(), env.step(np.ones((2, 2)))
    copies = observations.copy(), rewards.copy(), dones.copy()
    play(env, 5)
    assert_same([first, observations, rewards, dones], [kept, *copies])


# --- the single environments ------------------------------------------------------------------------------------------


def test_attributes_methods_and_wrappers_as_in_sb3(build):
    env = build([lambda: TimeLimit(Scripted((9,)), 5) for _ in range(3)], n_workers=2)
    env.reset()
    env.set_attr("tag", 7, indices=[0, 2])
    assert [env.has_attr("tag"), env.has_attr("lengths")] == [False, True]
    assert env.get_attr("tag", [2, 0]) == [7, 7]
    assert env.env_method("shift", 2, scale=3, indices=-1) == [7]
    assert env.env_is_wrapped(TimeLimit) == [True] * 3
    assert env.env_is_wrapped(Monitor, 1) == [False]
    assert env.render().shape == (4, 4, 3)  # three images of 2 × 2 and an empty one
    with pytest.raises(IndexError):
        env.get_attr("tag", 3)


def test_what_a_method_raises_is_raised_with_its_environment_and_the_workers_live_on(build):
    env = build(breaking("raise"), n_workers=2)
    with pytest.raises(AttributeError, match="nothing"):
        env.get_attr("nothing")
    with pytest.raises(ZeroDivisionError) as caught:
        env.env_method("break_now")
    assert "environment 3" in caught.value.__notes__[0] and "break_now" in caught.value.__notes__[0]
    assert env.reset().shape == (4, 3)


def test_an_exception_that_cannot_be_sent_is_told_and_the_workers_live_on(build):
    env = build([lambda: RaisesUnsendable((3,))] * 2, n_workers=1)
    with pytest.raises(RuntimeError, match="cannot be sent") as caught:
        env.env_method("complain")
    assert "environment 0" in caught.value.__notes__[0] and "out of oil" in caught.value.__notes__[0]
    assert env.reset().shape == (2, 3)


class Tells(Scripted):
    """Puts a secret into its infos."""

    def __init__(self, secret=None, when="step") -> None:
        super().__init__((3,))
        self.secret, self.when = secret, when

    def secrets(self):
        return self.secret()

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        return observation, info | ({"secret": self.secret()} if self.when == "reset" and self.secret else {})

    def step(self, action):
        *rest, info = super().step(action)
        return *rest, info | ({"secret": self.secret()} if self.when == "step" and self.secret else {})


@pytest.mark.parametrize("when", ["step", "reset"])
def test_an_info_that_cannot_be_sent_is_told_with_its_environment(when, build):
    secrets = [None, threading.Lock, None]
    env = build([lambda secret=secret: Tells(secret, when) for secret in secrets], n_workers=1)
    with pytest.raises(WorkerError, match=f"(?s)environment 1 .*in {when}:.*its info .* cannot be sent to another"):
        play(env, 3)


def test_an_answer_that_cannot_be_sent_is_told_with_its_environment_and_the_workers_live_on(build):
    env = build([lambda secret=secret: Tells(secret, "") for secret in (int, threading.Lock, int)], n_workers=1)
    with pytest.raises(TypeError, match="answer cannot be sent to another process") as caught:
        env.env_method("secrets")
    assert "environment 1" in caught.value.__notes__[0]
    assert env.env_method("secrets", indices=[2, 0]) == [0, 0]


def test_infos_may_hold_objects_of_classes_that_only_cloudpickle_takes(build):
    class Reading:  # as those of a script's `__main__`
        value = 7

    env = build([lambda: Tells(Reading)], n_workers=1)
    _, taken = play(env, 3)
    assert taken[-1].infos[0]["secret"].value == 7
    assert isinstance(taken[-1].infos[0]["secret"], Reading)


def test_attributes_are_read_in_the_middle_of_a_step_without_losing_it(build):
    ours, theirs = build(scripted((3,), (3,)), n_workers=2), DummyVecEnv(scripted((3,), (3,)))
    for env in (ours, theirs):
        env.seed(3)
        env.reset()
        env.step_async(np.ones((2, 2)))
    assert ours.get_attr("lengths") == theirs.get_attr("lengths")
    assert_same(ours.step_wait()[:3], theirs.step_wait()[:3])


def test_episodes_that_end_inside_a_wrapper_are_told_as_in_sb3(build):
    def episodes(env):
        env.reset()
        infos = [info for _ in range(12) for info in env.step(np.zeros((1, 2)))[3]]
        return [info["episode"]["l"] for info in infos if "episode" in info]

    fns = [lambda: Chained(Monitor(Scripted((3,))))]
    assert episodes(build(fns)) == episodes(DummyVecEnv(fns)) == [3, 3, 3, 3]


def test_functions_that_share_an_object_get_copies_of_it(build):
    shared = Scripted((3,))
    env = build([lambda: shared, lambda: shared], n_workers=1)
    env.reset()
    env.set_attr("steps", 2, indices=0)
    assert env.get_attr("steps") == [2, 0]


# --- whatever happens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how, said", [
    ("raise", "environment 3 raised an error in step:.*Traceback.*in break_now.*ZeroDivisionError: the robot fell"),
    ("leave", "environment 3 raised an error in step:.*SystemExit: 4"),
    ("exit", r"the process of environment 3 ended with exit code 3 in step\."),
    ("kill", "the process of environment 3 was killed by SIGKILL in step.*memory"),
    ("hang", r"environment 3 did not finish step within 3 s \(`timeout`\)"),
])  # fmt: skip
def test_a_breaking_environment_is_named_and_every_process_ended(how, said, build):
    # Starting a process counts, too, and on a busy machine takes seconds.
    env = build(breaking(how), n_workers=2, timeout=HANGS if how == "hang" else 120)
    with pytest.raises(WorkerError, match=f"(?s){said}") as caught:
        play(env, 5)
    assert not any(process.is_alive() for process in env._processes)
    assert type(caught.value.__cause__) is {"raise": ZeroDivisionError, "leave": SystemExit}.get(how, type(None))
    with pytest.raises(WorkerError, match="closed"):
        env.reset()


@pytest.mark.parametrize("how, where, said", [
    ("raise", "reset", "environment 0 raised an error in reset"),
    ("raise", "constructor", "environment 0 raised an error in starting"),
    ("exit", "constructor", "environment 0 ended with exit code 3 in starting"),
])  # fmt: skip
def test_an_environment_that_breaks_early_is_named(how, where, said, build):
    with pytest.raises(WorkerError, match=said):
        play(build(breaking(how, where, at=0, n_envs=2), n_workers=2), 5)


def test_environments_can_end_the_programs_they_have_started(tmp_path, build):
    env = build([lambda: StartsPrograms(str(tmp_path / "marker"))])
    env.reset()
    env.close()
    assert (tmp_path / "marker").read_text() == "ended"


@pytest.mark.parametrize("breaks", [False, True])
def test_programs_that_environments_leave_running_are_ended(breaks, build):
    env = build([lambda: StartsPrograms(breaks=breaks)] * 2, n_workers=1)
    env.reset()
    programs = env.env_method("pid")
    assert all(is_running(pid) for pid in programs)
    if breaks:
        with pytest.raises(WorkerError, match="the simulator is lost"):
            env.step(np.zeros((2, 2)))
    env.close()
    wait_until_gone(programs)


def test_threads_that_environments_leave_running_are_not_waited_for(build):
    def start():
        threading.Thread(target=time.sleep, args=(100,)).start()
        return Scripted((3,))

    env = build([start])
    env.close()
    assert [process.exitcode for process in env._processes] == [0]


def test_a_failed_step_that_nobody_waited_for_is_told_at_the_reset(build):
    env = build(breaking("raise"), n_workers=2)
    play(env, 2)
    env.step_async(np.zeros((4, 2)))
    with pytest.raises(WorkerError, match="environment 3 raised an error in step"):
        env.reset()


def test_a_timeout_is_for_one_call_not_for_all_environments_of_a_worker(build):
    class Slow(Scripted):
        def step(self, action):
            time.sleep(HANGS / 3)
            return super().step(action)

    env = build([lambda: Slow((9,)) for _ in range(4)], n_workers=1, timeout=HANGS)
    play(env, 1)  # 4/3 of the timeout


def test_a_worker_killed_between_steps_is_reported(build):
    env = build(scripted((3,), (3,), (3,)), n_workers=2)
    env.reset()
    env._processes[1].kill()
    env._processes[1].join()
    with pytest.raises(WorkerError, match="environments 1 to 2 was killed by SIGKILL"):
        env.step(np.zeros((3, 2)))


def test_closing_twice_or_in_the_middle_of_a_step_is_fine(build):
    env = build(scripted((3,), (3,)), n_workers=2)
    env.reset()
    env.step_async(np.zeros((2, 2)))
    env.close()
    env.close()
    with pytest.raises(WorkerError, match="closed"):
        env.step_wait()


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copying_is_refused_and_does_no_harm(copier, build):
    env = build(scripted((3,), (3,)), n_workers=2)
    env.reset()
    with pytest.raises(TypeError, match="WorkersVecEnv cannot be pickled or copied"):
        copier(env)
    gc.collect()
    env.step(np.zeros((2, 2)))


def test_a_forgotten_object_ends_its_processes_and_frees_its_memory():
    gc.collect()  # what errors in other tests still refer to
    before = len(shared_memory("self"))
    env = WorkersVecEnv(scripted((3,), (3,)), n_workers=2)
    pids = [process.pid for process in env._processes]
    assert len(shared_memory("self")) == before + 1
    del env
    gc.collect()
    wait_until_gone(pids)
    assert len(shared_memory("self")) == before


def test_shared_memory_has_no_name_that_could_outlive_the_processes(build):
    env = build(scripted((3,), (3,)), n_workers=1)
    [mapping] = shared_memory(env._processes[0].pid)
    assert mapping.endswith("(deleted)")


def test_a_reset_in_the_middle_of_a_step_starts_new_episodes(build):
    env = build(scripted((3,), (3,)), n_workers=2)
    env.reset()
    env.step_async(np.zeros((2, 2)))
    env.reset()
    with pytest.raises(RuntimeError, match="step_async"):
        env.step_wait()
    assert_same(env.get_attr("steps"), [0, 0])


@pytest.mark.parametrize("arguments, error, said", [
    ({"env_fns": []}, ValueError, "no environments"),
    ({"n_workers": 0}, ValueError, "`n_workers` must be an integer of at least 1, got 0"),
    ({"n_workers": True}, TypeError, "`n_workers` must be an integer"),
    ({"n_workers": 1.5}, TypeError, "`n_workers` must be an integer"),
    ({"timeout": -1}, ValueError, "`timeout` must be above 0 and at most 1000000 s, or None, got -1"),
    ({"timeout": float("inf")}, ValueError, "`timeout` must be above 0"),
    ({"timeout": float("nan")}, ValueError, "`timeout` must be above 0"),
    ({"timeout": "9"}, TypeError, "`timeout` must be a number of seconds or None, got '9'"),
])  # fmt: skip
def test_nonsense_is_refused(arguments, error, said):
    with pytest.raises(error, match=said):
        WorkersVecEnv(**({"env_fns": scripted((3,))} | arguments))


def test_ctrl_c_interrupts_only_the_parent_and_its_death_ends_the_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, sys, time
        import numpy as np
        from vec_env_cases import Scripted
        from sb3_pgplus.vec_env import WorkersVecEnv

        class Slow(Scripted):
            def step(self, action):
                time.sleep(0.3)
                return super().step(action)

        if __name__ == "__main__":
            multiprocessing.set_forkserver_preload(["sb3_pgplus.vec_env.worker_process"])
            env = WorkersVecEnv([lambda: Slow((9,))] * 4, n_workers=2)
            env.reset()
            print(*[process.pid for process in env._processes], flush=True)
            try:
                while True:
                    env.step(np.zeros((4, 2)))
            except KeyboardInterrupt:
                env.reset()
                env.step(np.zeros((4, 2)))
                print("steps again", *env.get_attr("steps"), flush=True)
            env.set_attr("steps", 0)
            while True:
                env.step(np.zeros((4, 2)))
    """)
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        start_new_session=True,
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    try:
        time.sleep(0.2)
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: every process of the group gets it
        assert parent.stdout.readline() == "steps again 1 1 1 1\n"
        assert all(is_running(pid) for pid in pids)
    finally:
        parent.kill()
    _, complaints = parent.communicate()
    wait_until_gone(pids)
    assert "Traceback" not in complaints


def test_a_program_that_forgets_to_close_ends_all_the_same(tmp_path):
    """Workers ignore SIGTERM, which is how multiprocessing's exit function ends processes before it waits for them."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys, weakref
        class Something: pass
        something = Something()
        weakref.finalize(something, print, "bye")  # from now on finalizers run after multiprocessing's exit function
        import multiprocessing.util
        from sb3_pgplus.vec_env import WorkersVecEnv
        import gymnasium as gym
        if __name__ == "__main__":
            env = WorkersVecEnv([lambda: gym.make("CartPole-v1")] * 2)
            env.reset()
            print(*(process.pid for process in env._processes))
            sys.exit(5)
    """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 5, done.stderr
    wait_until_gone([int(pid) for pid in done.stdout.split("\n")[0].split()])


def test_a_process_of_multiprocessings_that_forgets_to_close_ends_all_the_same(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, sys
        import gymnasium as gym
        from sb3_pgplus.vec_env import WorkersVecEnv
        kept = []
        def trial():
            kept.append(WorkersVecEnv([lambda: gym.make("CartPole-v1")] * 2))
            kept[0].reset()
            print(*(process.pid for process in kept[0]._processes), flush=True)
        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=trial)
            process.start()
            process.join()
            sys.exit(process.exitcode)
    """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wait_until_gone([int(pid) for pid in done.stdout.split("\n")[0].split()])


FORKED = {
    "fork": """
child = os.fork()
if not child:
    sys.exit(use())
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
""",
    "multiprocessing": """
process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(use()))
process.start()
process.join()
code = process.exitcode
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("way", FORKED)
def test_a_forked_child_gets_an_error_and_the_parent_goes_on(way):
    program = f"""
import gc, multiprocessing, os, sys
from vec_env_cases import scripted
from sb3_pgplus.vec_env import WorkersVecEnv
env = WorkersVecEnv(scripted((9,), (9,)), n_workers=2, start_method="fork")
env.reset()
def use():
    global env
    for call in (env.reset, lambda: env.step([[0, 0]] * 2), lambda: env.get_attr("steps")):
        try:
            call()
        except RuntimeError as error:
            assert "the process that forked this one" in str(error), error
        else:
            return 1
    env.close()
    del call, env
    gc.collect()
    return 7
{FORKED[way]}
env.step([[0, 0]] * 2)
print(code, *env.get_attr("steps"), flush=True)
env.close()
"""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.stdout == "7 1 1\n", done.stderr


# --- with SB3 around it -----------------------------------------------------------------------------------------------


def test_sb3_learns_the_same_parameters_as_with_dummy_vec_env(build):
    def trained(env):
        env = VecNormalize(env)
        return PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=2, seed=1, device="cpu").learn(256)

    fns = registered("Pendulum-v1", 3, max_episode_steps=11)
    ours, theirs = trained(build(monitored(fns), n_workers=2)), trained(oracle(fns))
    for name, parameter in theirs.policy.state_dict().items():
        assert parameter.equal(ours.policy.state_dict()[name]), name
    assert [record["r"] for record in ours.ep_info_buffer] == [record["r"] for record in theirs.ep_info_buffer]


def test_make_vec_env_and_evaluate_policy_work_with_it(recwarn):
    env = make_vec_env("CartPole-v1", 2, seed=0, vec_env_cls=WorkersVecEnv, vec_env_kwargs={"n_workers": 1})
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=16, device="cpu")
    rewards, lengths = evaluate_policy(model, env, n_eval_episodes=3, return_episode_rewards=True)
    assert rewards == [float(length) for length in lengths]
    assert not [w for w in recwarn if "Monitor" in str(w.message)]
    env.close()


class Simulator(Breaks):
    """Has a process of its own, which only ``close`` ends."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.process = subprocess.Popen(["sleep", "1000"])

    def process_id(self) -> int:
        return self.process.pid

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("how", ["", "hang", "kill", "exit"])
def test_no_process_that_an_environment_started_outlives_its_worker(how, build):
    env = build([lambda: Simulator(how)], timeout=HANGS if how == "hang" else 120)
    env.reset()
    started = env.env_method("process_id")
    assert all(map(is_running, started))
    if how:
        with pytest.raises(WorkerError):
            for _ in range(5):
                env.step(np.zeros((1, *env.action_space.shape)))
    else:
        env.close()
    wait_until_gone(started)


def test_an_environment_that_leaves_on_closing_leaves_the_others_to_be_closed(tmp_path):
    paths = [tmp_path / str(i) for i in range(2)]
    env = WorkersVecEnv([LeavesOnClosing, *(lambda p=p: LeavesOnClosing(str(p)) for p in paths)], n_workers=1)
    env.reset()
    env.close()
    assert [path.read_text() for path in paths] == ["closed"] * 2


def test_observations_without_a_shape_are_refused_by_name():
    with pytest.raises(ValueError, match=r"SB3 cannot learn from observations of Text"):
        WorkersVecEnv([lambda: Speaks((10,))])


@pytest.mark.parametrize(("seed", "error"), [(1.5, TypeError), (-1, ValueError)])
def test_a_wrong_seed_is_refused_and_ends_no_process(seed, error):
    env = WorkersVecEnv([lambda: Scripted((10,))] * 2)
    with pytest.raises(error, match="`seed` must be an integer of at least 0"):
        env.seed(seed)
    assert env.seed(np.int64(3)) == [3, 4]
    env.reset()
    env.close()
