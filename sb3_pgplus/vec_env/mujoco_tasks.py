"""
Gymnasium's eleven MuJoCo v5 tasks over N simulations at once: observations, rewards, terminations and reset states.

Every formula is Gymnasium's, with its order of operations and its types, so that the numbers are equal bit for bit.
What looks unusual below is for that: ``control_cost`` stays float32 for float32 actions, norms go through BLAS's
``ddot`` as ``numpy.linalg.norm`` does, and squares of single numbers are libm's ``pow``. Settings are read from one
environment that ``gymnasium.make`` built, so that its keyword arguments act.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np

from sb3_pgplus.vec_env.common import Array

Rows = slice | Array
"""Which simulations: all of them as a slice, or indices."""
ALL = slice(None)


class Outcome(NamedTuple):
    """What one step came to in N simulations."""

    #: float64, ``[N]``
    rewards: Array
    #: bool, ``[N]``
    terminated: Array
    #: Velocities and terms of the reward, under the names of Gymnasium's info, each ``[N]``.
    terms: dict[str, Array]


def norm(vectors: Array) -> Array:
    """
    Euclidean norm of each row, with the rounding of ``numpy.linalg.norm`` on that row alone.

    :param vectors: ``[N, d]``
    :return: ``[N]``
    """
    lengths: Array = np.sqrt(np.vecdot(vectors, vectors))
    return lengths


def squared_sum(fields: Array) -> Array:
    """
    Σ x² over everything but the first axis, in the order in which ``numpy.sum`` adds one row.

    :param fields: C-contiguous, ``[N, ...]``
    :return: ``[N]``, of the same type
    """
    # What `.sum(axis=1)` calls after some Python.
    total: Array = np.add.reduce(np.square(fields).reshape(len(fields), -1), axis=1)
    return total


class Task:
    """
    One Gymnasium task over a batch. Arrays of simulation fields are live: they change when the batch steps or resets.

    :param env: the unwrapped Gymnasium environment that the settings are read from
    :param batch: N simulations of its model (``mujoco.batch.Batch``)
    """

    #: Whether the task reads contact forces, which a batch computes only if each simulation keeps its own data.
    needs_contact_forces: ClassVar[bool] = False
    #: Whether what :meth:`before_step` would keep was restored: a new batch lacks the fields that it is read from.
    is_restored = False

    def __init__(self, env: Any, batch: Any) -> None:
        self.env = env
        self.batch = batch
        self.dt = env.dt
        self.qpos, self.qvel, self.ctrl = (batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self.never: Array = np.zeros(batch.nsim, dtype=bool)

    def before_step(self) -> None:
        """Keep what the reward compares the state after the step with."""

    def after_step(self) -> None:
        """Compute what the batch itself does not."""

    def after_reset(self, rows: Array) -> None:
        """
        Set what the batch itself does not.

        :param rows: indices of the simulations that were reset
        """

    def observations(self, rows: Rows) -> Array:
        """
        :param rows: K simulations
        :return: a new array ``[K, d]``
        """
        return np.concatenate((self.qpos[rows], self.qvel[rows]), axis=1)

    def outcome(self, actions: Array) -> Outcome:
        """
        :param actions: those of the step just taken, ``[N, d]``, in the type in which they came
        """
        raise NotImplementedError

    def step_info(self) -> dict[str, Array]:
        """
        Entries of Gymnasium's info that are not in :class:`Outcome`: functions of the state alone.

        :return: name → ``[N]`` or ``[N, d]``
        """
        return {}

    def reset_info(self) -> dict[str, Array]:
        """:return: the info of Gymnasium's ``reset``, name → ``[N]`` or ``[N, d]``"""
        return {}

    def sample_state(self, generator: np.random.Generator) -> tuple[Array, Array]:
        """
        Draw the state an episode starts in, in Gymnasium's order of draws.

        :param generator: the environment's own
        :return: positions and velocities
        """
        return self.noise_around(self.env.init_qpos, generator), self.noise_around(self.env.init_qvel, generator)

    def noise_around(self, mean: Array, generator: np.random.Generator) -> Array:
        """:return: mean + U(−s, s) with s the task's ``reset_noise_scale``."""
        scale = self.env._reset_noise_scale
        noisy: Array = mean + generator.uniform(low=-scale, high=scale, size=mean.size)
        return noisy

    def normal_noise_around(self, mean: Array, generator: np.random.Generator) -> Array:
        """:return: mean + s·N(0, 1) with s the task's ``reset_noise_scale``."""
        noisy: Array = mean + self.env._reset_noise_scale * generator.standard_normal(mean.size)
        return noisy

    def get_state(self) -> dict[str, Array]:
        """:return: what the next step needs besides the state of the simulations"""
        if not self.is_restored:
            self.before_step()
        return {name: value.copy() for name, value in vars(self).items() if name.endswith("_before")}

    def set_state(self, state: dict[str, Array]) -> None:
        """
        Undo :meth:`get_state`, after the simulations have their states.

        :param state: what it returned
        """
        self.is_restored = True
        for name, value in state.items():
            setattr(self, name, value.copy())

    def body_position(self, body: int | str) -> Array:
        """
        :param body: index or name
        :return: its position as of the last substep, as in Gymnasium: live, ``[N, 3]``
        """
        position: Array = self.batch.bind("xpos")[:, self.env.model.body(body).id]
        return position


# --- moving forward ---------------------------------------------------------------------------------------------------


class Locomotion(Task):
    """Tasks that reward the velocity along x; a position that the reward does not depend on is not observed."""

    #: How many of the first positions ``exclude_current_positions_from_observation`` hides.
    unobserved: ClassVar[int] = 1

    def __init__(self, env: Any, batch: Any) -> None:
        super().__init__(env, batch)
        self.observed_from = self.unobserved if env._exclude_current_positions_from_observation else 0

    def observations(self, rows: Rows) -> Array:
        return np.concatenate((self.qpos[rows, self.observed_from :], self.qvel[rows]), axis=1)

    def before_step(self) -> None:
        self.x_before = self.qpos[:, 0].copy()

    def x_velocity(self) -> Array:
        """:return: (x' − x) / dt, ``[N]``"""
        velocity: Array = (self.qpos[:, 0] - self.x_before) / self.dt
        return velocity

    def control_cost(self, actions: Array) -> Array:
        """:return: w·‖a‖², ``[N]``, float32 for float32 actions"""
        cost: Array = self.env._ctrl_cost_weight * squared_sum(actions)
        return cost

    def termination(self, healthy: Array) -> Array:
        """:return: ``[N]``"""
        return ~healthy if self.env._terminate_when_unhealthy else self.never


class HalfCheetah(Locomotion):
    """``HalfCheetah-v5``."""

    def outcome(self, actions: Array) -> Outcome:
        velocity = self.x_velocity()
        forward = self.env._forward_reward_weight * velocity
        control = self.control_cost(actions)
        terms = {"x_velocity": velocity, "reward_forward": forward, "reward_ctrl": -control}
        return Outcome(forward - control, self.never, terms)

    def step_info(self) -> dict[str, Array]:
        return {"x_position": self.qpos[:, 0]}

    reset_info = step_info

    def sample_state(self, generator: np.random.Generator) -> tuple[Array, Array]:
        qpos = self.noise_around(self.env.init_qpos, generator)
        return qpos, self.normal_noise_around(self.env.init_qvel, generator)


class Swimmer(HalfCheetah):
    """``Swimmer-v5``: moves in a plane."""

    unobserved = 2
    sample_state = Task.sample_state

    def before_step(self) -> None:
        self.xy_before = self.qpos[:, :2].copy()

    def outcome(self, actions: Array) -> Outcome:
        xy_velocity = (self.qpos[:, :2] - self.xy_before) / self.dt
        forward = self.env._forward_reward_weight * xy_velocity[:, 0]
        control = self.control_cost(actions)
        terms = {"x_velocity": xy_velocity[:, 0], "y_velocity": xy_velocity[:, 1]}
        return Outcome(forward - control, self.never, terms | {"reward_forward": forward, "reward_ctrl": -control})

    def step_info(self) -> dict[str, Array]:
        return position_in_plane(self.qpos)

    reset_info = step_info


def position_in_plane(qpos: Array) -> dict[str, Array]:
    """
    :param qpos: ``[N, nq]``, the first two being x and y
    :return: the info entries about them
    """
    return {"x_position": qpos[:, 0], "y_position": qpos[:, 1], "distance_from_origin": norm(qpos[:, :2])}


class Walker2d(Locomotion):
    """``Walker2d-v5``: an episode ends when the torso falls or leans too far."""

    def observations(self, rows: Rows) -> Array:
        return np.concatenate((self.qpos[rows, self.observed_from :], np.clip(self.qvel[rows], -10, 10)), axis=1)

    def outcome(self, actions: Array) -> Outcome:
        velocity, healthy = self.x_velocity(), self.healthy()
        forward = self.env._forward_reward_weight * velocity
        survive = healthy * self.env._healthy_reward
        control = self.control_cost(actions)
        terms = {"reward_forward": forward, "reward_ctrl": -control, "reward_survive": survive}
        return Outcome(forward + survive - control, self.termination(healthy), {"x_velocity": velocity, **terms})

    def healthy(self) -> Array:
        """:return: whether height and angle are in their ranges, ``[N]``"""
        return self.within(self.qpos[:, 1], self.env._healthy_z_range) & self.within(
            self.qpos[:, 2], self.env._healthy_angle_range
        )

    @staticmethod
    def within(values: Array, bounds: tuple[float, float]) -> Array:
        """:return: low < value < high, elementwise"""
        inside: Array = (bounds[0] < values) & (values < bounds[1])
        return inside

    def step_info(self) -> dict[str, Array]:
        return {"x_position": self.qpos[:, 0], "z_distance_from_origin": self.qpos[:, 1] - self.env.init_qpos[1]}

    reset_info = step_info


class Hopper(Walker2d):
    """``Hopper-v5``: the rest of the state has a range, too."""

    def healthy(self) -> Array:
        bounds = self.env._healthy_state_range
        state = self.within(self.qpos[:, 2:], bounds).all(axis=1) & self.within(self.qvel, bounds).all(axis=1)
        healthy: Array = state & super().healthy()
        return healthy


# --- with contact forces ----------------------------------------------------------------------------------------------


class ContactTask(Locomotion):
    """Tasks in three dimensions that read the contact forces on each body."""

    needs_contact_forces = True
    unobserved = 2

    def __init__(self, env: Any, batch: Any) -> None:
        super().__init__(env, batch)
        self.contact_forces = np.zeros((batch.nsim, *env.data.cfrc_ext.shape))

    def after_step(self) -> None:
        # MuJoCo computes these forces on request only. The request is a function of one MjData, and there is no other
        # way to have them after RK4's last stage, where Gymnasium asks for them.
        import mujoco

        model, scratch = self.env.model, self.env.data
        for i in range(self.batch.nsim):
            self.batch.get_data(i, scratch)
            mujoco.mj_rnePostConstraint(model, scratch)
            self.contact_forces[i] = scratch.cfrc_ext

    def after_reset(self, rows: Array) -> None:
        self.contact_forces[rows] = 0.0

    def get_state(self) -> dict[str, Array]:
        return super().get_state() | {"contact_forces": self.contact_forces.copy()}


class Ant(ContactTask):
    """``Ant-v5``."""

    def __init__(self, env: Any, batch: Any) -> None:
        super().__init__(env, batch)
        self.xy = self.body_position(env._main_body)[:, :2]

    def observations(self, rows: Rows) -> Array:
        parts = [self.qpos[rows, self.observed_from :], self.qvel[rows]]
        if self.env._include_cfrc_ext_in_observation:
            forces = np.clip(self.contact_forces[rows, 1:], *self.env._contact_force_range)
            parts.append(forces.reshape(len(forces), -1))
        return np.concatenate(parts, axis=1)

    def before_step(self) -> None:
        self.xy_before = self.xy.copy()

    def outcome(self, actions: Array) -> Outcome:
        env = self.env
        xy_velocity = (self.xy - self.xy_before) / self.dt
        healthy = self.healthy()
        forward = xy_velocity[:, 0] * env._forward_reward_weight
        survive = healthy * env._healthy_reward
        control = self.control_cost(actions)
        contact = env._contact_cost_weight * squared_sum(np.clip(self.contact_forces, *env._contact_force_range))
        rewards = forward + survive - (control + contact)
        velocities = {"x_velocity": xy_velocity[:, 0], "y_velocity": xy_velocity[:, 1]}
        costs = {"reward_ctrl": -control, "reward_contact": -contact}
        terms = {**velocities, "reward_forward": forward, **costs, "reward_survive": survive}
        return Outcome(rewards, self.termination(healthy), terms)

    def healthy(self) -> Array:
        """:return: whether the state is finite and the height in its range, ``[N]``"""
        low, high = self.env._healthy_z_range
        finite = np.isfinite(self.qpos).all(axis=1) & np.isfinite(self.qvel).all(axis=1)
        healthy: Array = finite & (low <= self.qpos[:, 2]) & (self.qpos[:, 2] <= high)
        return healthy

    def step_info(self) -> dict[str, Array]:
        return position_in_plane(self.qpos)

    reset_info = step_info

    def sample_state(self, generator: np.random.Generator) -> tuple[Array, Array]:
        qpos = self.noise_around(self.env.init_qpos, generator)
        return qpos, self.normal_noise_around(self.env.init_qvel, generator)


class HumanoidBody(ContactTask):
    """What the two humanoid tasks share."""

    def __init__(self, env: Any, batch: Any) -> None:
        super().__init__(env, batch)
        fields = ("cinert", "cvel", "qfrc_actuator", "ten_length", "ten_velocity")
        self.cinert, self.cvel, self.qfrc_actuator, self.ten_length, self.ten_velocity = map(batch.bind, fields)

    def observations(self, rows: Rows) -> Array:
        env = self.env
        parts = [self.qpos[rows, self.observed_from :], self.qvel[rows]]
        # Gymnasium compares these four with `is True`: 1 leaves a part out there, too.
        if env._include_cinert_in_observation is True:
            parts.append(self.cinert[rows, 1:])
        if env._include_cvel_in_observation is True:
            parts.append(self.cvel[rows, 1:])
        if env._include_qfrc_actuator_in_observation is True:
            parts.append(self.qfrc_actuator[rows, 6:])
        if env._include_cfrc_ext_in_observation is True:
            parts.append(self.contact_forces[rows, 1:])
        return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)

    def control_cost(self, actions: Array) -> Array:
        # Of the simulation's float64 controls, not of the actions: MuJoCo zeroes them when a simulation diverges.
        return super().control_cost(self.ctrl)

    def clipped_contact_cost(self, weight: float, bounds: tuple[float, float]) -> Array:
        """:return: w·Σ f², clipped, ``[N]``"""
        return np.clip(weight * squared_sum(self.contact_forces), *bounds)

    def tendons(self) -> dict[str, Array]:
        """:return: the info entries about them, each ``[N, 2]``"""
        return {"tendon_length": self.ten_length.copy(), "tendon_velocity": self.ten_velocity.copy()}


class Humanoid(HumanoidBody):
    """``Humanoid-v5``: rewards the velocity of the centre of mass."""

    def __init__(self, env: Any, batch: Any) -> None:
        super().__init__(env, batch)
        self.xipos = batch.bind("xipos")
        self.body_mass, self.total_mass = env.model.body_mass.copy(), env.model.body_mass.sum()

    def centre_of_mass(self) -> Array:
        """:return: its x and y, ``[N, 2]``"""
        centre: Array = (np.einsum("b,nbj->nj", self.body_mass, self.xipos) / self.total_mass)[:, :2]
        return centre

    def before_step(self) -> None:
        self.xy_before = self.centre_of_mass()

    def outcome(self, actions: Array) -> Outcome:
        env = self.env
        xy_velocity = (self.centre_of_mass() - self.xy_before) / self.dt
        healthy = Walker2d.within(self.qpos[:, 2], env._healthy_z_range)
        forward = env._forward_reward_weight * xy_velocity[:, 0]
        survive = healthy * env._healthy_reward
        control = self.control_cost(actions)
        contact = self.clipped_contact_cost(env._contact_cost_weight, env._contact_cost_range)
        rewards = forward + survive - (control + contact)
        velocities = {"x_velocity": xy_velocity[:, 0], "y_velocity": xy_velocity[:, 1]}
        costs = {"reward_ctrl": -control, "reward_contact": -contact}
        terms = {**velocities, "reward_survive": survive, "reward_forward": forward, **costs}
        return Outcome(rewards, self.termination(healthy), terms)

    def step_info(self) -> dict[str, Array]:
        return position_in_plane(self.qpos) | self.tendons()

    reset_info = step_info


class HumanoidStandup(HumanoidBody):
    """``HumanoidStandup-v5``: rewards the height of the torso."""

    def outcome(self, actions: Array) -> Outcome:
        env = self.env
        standing_up = (self.qpos[:, 2] - 0) / env.model.opt.timestep
        control = self.control_cost(actions)
        impact = self.clipped_contact_cost(env._impact_cost_weight, env._impact_cost_range)
        terms = {"reward_linup": standing_up, "reward_quadctrl": -control, "reward_impact": -impact}
        return Outcome(standing_up - control - impact + 1, self.never, terms)

    def step_info(self) -> dict[str, Array]:
        height = {"z_distance_from_origin": self.qpos[:, 2] - self.env.init_qpos[2]}
        return {"x_position": self.qpos[:, 0], "y_position": self.qpos[:, 1], **height, **self.tendons()}

    reset_info = step_info


# --- reaching and balancing -------------------------------------------------------------------------------------------


class Reacher(Task):
    """``Reacher-v5``."""

    def __init__(self, env: Any, batch: Any) -> None:
        super().__init__(env, batch)
        self.fingertip, self.target = self.body_position("fingertip"), self.body_position("target")

    def observations(self, rows: Rows) -> Array:
        qpos, angles = self.qpos[rows], np.ascontiguousarray(self.qpos[rows, :2])
        to_target = (self.fingertip[rows] - self.target[rows])[:, :2]
        parts = (np.cos(angles), np.sin(angles), qpos[:, 2:], self.qvel[rows, :2], to_target)
        return np.concatenate(parts, axis=1)

    def outcome(self, actions: Array) -> Outcome:
        distance = -norm(self.fingertip - self.target) * self.env._reward_dist_weight
        control = -squared_sum(actions) * self.env._reward_control_weight
        return Outcome(distance + control, self.never, {"reward_dist": distance, "reward_ctrl": control})

    def sample_state(self, generator: np.random.Generator) -> tuple[Array, Array]:
        env = self.env
        qpos = generator.uniform(low=-0.1, high=0.1, size=env.model.nq) + env.init_qpos
        while True:
            goal = generator.uniform(low=-0.2, high=0.2, size=2)
            if np.linalg.norm(goal) < 0.2:
                break
        qpos[-2:] = goal
        qvel = env.init_qvel + generator.uniform(low=-0.005, high=0.005, size=env.model.nv)
        qvel[-2:] = 0
        return qpos, qvel


class Pusher(Task):
    """``Pusher-v5``."""

    def __init__(self, env: Any, batch: Any) -> None:
        super().__init__(env, batch)
        self.arm, self.object, self.goal = map(self.body_position, ("tips_arm", "object", "goal"))

    def observations(self, rows: Rows) -> Array:
        parts = (self.qpos[rows, :7], self.qvel[rows, :7], self.arm[rows], self.object[rows], self.goal[rows])
        return np.concatenate(parts, axis=1)

    def outcome(self, actions: Array) -> Outcome:
        near = -norm(self.object - self.arm) * self.env._reward_near_weight
        distance = -norm(self.object - self.goal) * self.env._reward_dist_weight
        control = -squared_sum(actions) * self.env._reward_control_weight
        terms = {"reward_dist": distance, "reward_ctrl": control, "reward_near": near}
        return Outcome(distance + control + near, self.never, terms)

    def sample_state(self, generator: np.random.Generator) -> tuple[Array, Array]:
        env, goal = self.env, np.zeros(2)
        while True:
            x = generator.uniform(low=-0.3, high=0, size=1)
            cylinder = np.concatenate((x, generator.uniform(low=-0.2, high=0.2, size=1)))
            if np.linalg.norm(cylinder - goal) > 0.17:
                break
        qpos = env.init_qpos.copy()
        qpos[-4:-2], qpos[-2:] = cylinder, goal
        qvel = env.init_qvel + generator.uniform(low=-0.005, high=0.005, size=env.model.nv)
        qvel[-4:] = 0
        return qpos, qvel


class InvertedPendulum(Task):
    """``InvertedPendulum-v5``."""

    def outcome(self, actions: Array) -> Outcome:
        finite = np.isfinite(self.qpos).all(axis=1) & np.isfinite(self.qvel).all(axis=1)
        terminated: Array = ~finite | (np.abs(self.qpos[:, 1]) > 0.2)
        survive = (~terminated).astype(np.int64)
        return Outcome(survive.astype(np.float64), terminated, {"reward_survive": survive})


class InvertedDoublePendulum(Task):
    """``InvertedDoublePendulum-v5``."""

    def __init__(self, env: Any, batch: Any) -> None:
        super().__init__(env, batch)
        self.tip = batch.bind("site_xpos")[:, 0]
        self.qfrc_constraint = batch.bind("qfrc_constraint")

    def observations(self, rows: Rows) -> Array:
        angles = np.ascontiguousarray(self.qpos[rows, 1:])
        velocities, force = np.clip(self.qvel[rows], -10, 10), np.clip(self.qfrc_constraint[rows, :1], -10, 10)
        return np.concatenate((self.qpos[rows, :1], np.sin(angles), np.cos(angles), velocities, force), axis=1)

    def outcome(self, actions: Array) -> Outcome:
        terminated: Array = self.tip[:, 2] <= 1
        distance = 0.01 * squares(self.tip[:, 0]) + squares(self.tip[:, 2] - 2)
        velocity = 0.001 * squares(self.qvel[:, 1]) + 0.005 * squares(self.qvel[:, 2])
        # Products with Python's 1 and 0, which leave the reward its type.
        alive = np.where(terminated, self.env._healthy_reward * 0, self.env._healthy_reward * 1)
        terms = {"reward_survive": alive, "distance_penalty": -distance, "velocity_penalty": -velocity}
        return Outcome(alive - distance - velocity, terminated, terms)

    def sample_state(self, generator: np.random.Generator) -> tuple[Array, Array]:
        qpos = self.noise_around(self.env.init_qpos, generator)
        return qpos, self.normal_noise_around(self.env.init_qvel, generator)


def squares(values: Array) -> Array:
    """
    x², each rounded as Gymnasium's ``x**2`` of a single number is: by libm's ``pow``, where arrays multiply.

    :param values: ``[N]``
    """
    return np.array([value**2 for value in values.tolist()])


TASKS: dict[str, type[Task]] = {
    "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv": HalfCheetah,
    "gymnasium.envs.mujoco.hopper_v5:HopperEnv": Hopper,
    "gymnasium.envs.mujoco.walker2d_v5:Walker2dEnv": Walker2d,
    "gymnasium.envs.mujoco.swimmer_v5:SwimmerEnv": Swimmer,
    "gymnasium.envs.mujoco.ant_v5:AntEnv": Ant,
    "gymnasium.envs.mujoco.humanoid_v5:HumanoidEnv": Humanoid,
    "gymnasium.envs.mujoco.humanoidstandup_v5:HumanoidStandupEnv": HumanoidStandup,
    "gymnasium.envs.mujoco.reacher_v5:ReacherEnv": Reacher,
    "gymnasium.envs.mujoco.pusher_v5:PusherEnv": Pusher,
    "gymnasium.envs.mujoco.inverted_pendulum_v5:InvertedPendulumEnv": InvertedPendulum,
    "gymnasium.envs.mujoco.inverted_double_pendulum_v5:InvertedDoublePendulumEnv": InvertedDoublePendulum,
}
"""Gymnasium's class, as its registry names it → ours."""
