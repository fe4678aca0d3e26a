"""
Continuous control from beginning to end: train on HalfCheetah, evaluate over ten episodes, record a video.

What you learn here: how to train on a MuJoCo task with the defaults (all tricks on), why a policy is evaluated twice
(deterministic: its mean action; stochastic: actions drawn as in training), and how to film it on a machine without a
screen. Needs the extras `mujoco` and `report`.

    python examples/continuous_control.py
    python examples/continuous_control.py --env Hopper-v5 --timesteps 1e6 --seed 1
    python examples/continuous_control.py --no-video
"""

import argparse
from pathlib import Path

from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecVideoRecorder

from sb3_pgplus import PPOPlus, make_vec_env
from sb3_pgplus.playing import prepare_offscreen_rendering


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train PPOPlus on a continuous control task, evaluate it, film it.")
    parser.add_argument("--env", default="HalfCheetah-v5", help="environment id")
    parser.add_argument("--timesteps", type=float, default=1e6, help="environment steps")
    parser.add_argument("--n-envs", type=int, default=8, help="environments side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--video-length", type=int, default=300, help="steps of the video")
    parser.add_argument("--no-video", action="store_true")
    parser.add_argument("--no-progress", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/continuous_control"), help="folder for model and video")
    return parser.parse_args()


def train(args: argparse.Namespace) -> PPOPlus:
    env = make_vec_env(args.env, n_envs=args.n_envs, seed=args.seed)
    # 2048 samples a rollout, however many environments share the work. A network this small is fastest on the CPU.
    n_steps = max(1, 2048 // args.n_envs)
    model = PPOPlus("MlpPolicy", env, n_steps=n_steps, seed=args.seed, device="cpu", verbose=0)
    model.learn(args.timesteps, progress_bar=not args.no_progress)
    env.close()
    return model


def evaluate(model: PPOPlus, args: argparse.Namespace, *, deterministic: bool) -> None:
    # Raw rewards, whole episodes, other seeds than in training.
    env = make_vec_env(args.env, seed=args.seed + 1_000_000)
    mean, std = evaluate_policy(model, env, args.eval_episodes, deterministic=deterministic)
    env.close()
    name = "deterministic" if deterministic else "stochastic"
    print(f"{name:>13}: mean return {mean:.1f} ± {std:.1f} over {args.eval_episodes} episodes")


def record_video(model: PPOPlus, args: argparse.Namespace) -> Path:
    env = make_vec_env(args.env, seed=args.seed + 2_000_000, env_kwargs={"render_mode": "rgb_array"})
    # The recorder keeps its frames in memory until the video is complete, so a whole episode would need a lot.
    recorder = VecVideoRecorder(
        env,
        str(args.out),
        record_video_trigger=lambda step: step == 0,
        video_length=args.video_length,
        name_prefix=args.env.replace("/", "-"),
    )
    evaluate_policy(model, recorder, n_eval_episodes=1)
    recorder.close()
    return Path(recorder.video_path)


def main() -> None:
    args = parse_arguments()
    if not args.no_video:
        # MuJoCo decides how to draw when it is first imported, which is when the first environment is made.
        prepare_offscreen_rendering()

    model = train(args)
    model.save(args.out / "model.zip")
    print(f"model: {args.out / 'model.zip'}")

    evaluate(model, args, deterministic=True)
    evaluate(model, args, deterministic=False)

    if args.no_video:
        return
    try:
        print(f"video: {record_video(model, args)}")
    except Exception as error:  # every renderer fails in its own way, and the training is worth keeping
        print(f"no video: {args.env} could not be rendered here ({type(error).__name__}: {error}).")
        print("Without a screen MuJoCo needs EGL or OSMesa: install libegl1 or libosmesa6; `pip install moviepy` too.")


if __name__ == "__main__":
    main()
