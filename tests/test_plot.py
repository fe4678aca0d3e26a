"""Learning curves over seeds: which runs are one line, what the line is, and that pictures come out of real runs."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_cli import run, succeed

from sb3_pgplus.configs import ConfigError
from sb3_pgplus.reporting.comparison import band_of, on_common_points, plot_curves
from sb3_pgplus.reporting.learning_curve import Episodes
from sb3_pgplus.reporting.runs import Run, Series, find_runs, grouped, read_metrics, read_run
from sb3_pgplus.run_folder import RunFolder
from sb3_pgplus.statistics import iqm

PNG = b"\x89PNG\r\n\x1a\n"
SHORT = ("--n-timesteps", "1024", "--set", "n_steps=64", "--no-progress", "--eval-episodes", "3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of PPO, one of them with evaluations, and one A2C."""
    root = tmp_path_factory.mktemp("runs")
    ppo = ("train", "--env", "CartPole-v1", *SHORT, "--n-envs", "2", "--set", "n_epochs=2", "--set", "batch_size=64")
    for seed in ("0", "1"):
        succeed(*ppo, "--seed", seed, "--eval-freq", "400", "--out", root / f"ppo{seed}")
    succeed("train", "--algo", "a2cplus", "--env", "CartPole-v1", *SHORT, "--out", root / "a2c")
    return root


def series(steps: list[float], values: list[float]) -> Series:
    return Series(np.array(steps, float), np.array(values, float), np.array(steps, float) / 100)


def variant(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a run with other settings written in its configuration."""
    shutil.copytree(source, target)
    config = yaml.safe_load((target / "config.yml").read_text(encoding="utf-8")) | changes
    (target / "config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return target


# --- which runs are one line ------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_alone_are_one_experiment(runs: Path) -> None:
    groups = grouped(find_runs([runs]))
    names = {env: {label: [run.folder.path.name for run in g] for label, g in m.items()} for env, m in groups.items()}
    assert names == {"CartPole-v1": {"A2CPlus": ["a2c"], "PPOPlus": ["ppo0", "ppo1"]}}


def test_a_setting_that_differs_is_named_and_makes_another_line(runs: Path, tmp_path: Path) -> None:
    changed = variant(runs / "ppo0", tmp_path / "changed", n_epochs=7, policy_kwargs={"net_arch": [16]})
    other_env = variant(runs / "ppo0", tmp_path / "other", env="Acrobot-v1")
    found = grouped(find_runs([runs / "ppo0", runs / "ppo1", changed, other_env]))
    assert {env: list(members) for env, members in found.items()} == {
        "CartPole-v1": [
            "PPOPlus, n_epochs=2, policy_kwargs=None",
            "PPOPlus, n_epochs=7, policy_kwargs={net_arch: [16]}",
        ],
        "Acrobot-v1": ["PPOPlus"],
    }
    assert len(found["CartPole-v1"]["PPOPlus, n_epochs=2, policy_kwargs=None"]) == 2


def test_a_folder_given_twice_counts_once(runs: Path) -> None:
    assert len(find_runs([runs, runs / "ppo0", runs / "a2c"])) == 3


def test_what_lies_in_a_run_folder_is_no_run_of_its_own(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "ppo0", tmp_path / "sweep" / "run"))
    shutil.copytree(runs / "a2c", folder / "hub")  # push --dry-run leaves one there
    for path in (tmp_path, folder):
        assert [found.folder.path for found in find_runs([path])] == [folder]
    assert [found.folder.path for found in find_runs([folder / "hub"])] == [folder / "hub"]  # if asked for


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_curves_are_compared_where_all_of_them_have_values() -> None:
    # y = x on [0, 100] and y = 2x on [20, 60]: the points they share are 20 to 60.
    points, values = on_common_points([series([0, 100], [0, 100]), series([20, 60], [40, 120])], "steps")
    assert (points[0], points[-1]) == (20, 60)
    assert np.allclose(values[0], points) and np.allclose(values[1], 2 * points)
    middle, low, high = band_of(values)
    assert np.allclose(middle, 1.5 * points)  # of two values no quarter is left out
    assert np.allclose(low, points) and np.allclose(high, 2 * points)


def test_a_curves_points_are_the_statistics_of_each_column() -> None:
    values = np.random.default_rng(1).normal(size=(5, 130))
    middle, low, high = band_of(values)
    assert middle.tolist() == pytest.approx([iqm(column) for column in values.T])
    assert (low <= middle).all() and (middle <= high).all()
    assert all((part == values[0]).all() for part in band_of(values[:1]))


def test_the_time_axis_is_the_seconds_of_the_episodes(runs: Path) -> None:
    curve = read_run(runs / "ppo0").curve()
    rows = [line.split(",") for line in (runs / "ppo0" / "episodes.csv").read_text("utf-8").splitlines()[1:]]
    assert curve.over("time").tolist() == [float(row[3]) for row in rows]
    assert curve.over("steps").tolist() == [float(row[0]) for row in rows]
    # The last point is the mean of the last episodes: 5 of up to 100.
    assert curve.values[-1] == pytest.approx(np.mean([float(row[1]) for row in rows[-5:]]))


def test_a_curve_has_no_points_where_no_return_is_a_number() -> None:
    episodes = Episodes([10, 20, 30], [np.nan, 2.0, 4.0], [10] * 3, [1.0, 2.0, 3.0])
    curve = Run(RunFolder(Path("nowhere")), {}, episodes).curve()
    assert curve.steps.tolist() == [20, 30] and curve.values.tolist() == [2.0, 3.0]
    assert curve.seconds.tolist() == [2.0, 3.0]


def test_evaluations_are_drawn_as_the_means_of_their_returns(runs: Path) -> None:
    curve = read_run(runs / "ppo0").curve("evaluations")
    with np.load(runs / "ppo0" / "evaluations.npz") as file:
        assert curve.values.tolist() == file["results"].mean(axis=1).tolist()
        assert curve.steps.tolist() == file["timesteps"].tolist() == [400, 800]
    with pytest.raises(ConfigError, match=r"a2c has no evaluations\.npz: train with --eval-freq"):
        read_run(runs / "a2c").curve("evaluations")


def test_metrics_leave_empty_cells_and_a_torn_line_out(tmp_path: Path) -> None:
    path = tmp_path / "progress.csv"
    path.write_text("time/total_timesteps,train/std,rollout/x\n10,,a\n20,0.5,\n30,0.25,\n40,0.1", encoding="utf-8")
    metrics = read_metrics(path)
    assert list(metrics) == ["train/std"]
    assert metrics["train/std"].steps.tolist() == [20, 30] and metrics["train/std"].values.tolist() == [0.5, 0.25]


def test_a_run_killed_while_it_wrote_an_episode_can_be_read(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "ppo0", tmp_path / "run"))
    n_before = len(read_run(folder).episodes)
    with (folder / "episodes.csv").open("a", encoding="utf-8") as file:
        file.write("1090,3")
    assert len(read_run(folder).episodes) == n_before


@pytest.mark.parametrize(
    "options", [(), ("--x", "time"), ("--evaluations",), ("--metrics",), ("--metrics", "--x", "time")]
)
def test_the_command_draws_a_picture(runs: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    picture = tmp_path / "new" / "picture.png"
    folders = (runs / "ppo0", runs / "ppo1") if "--evaluations" in options else (runs,)
    output = succeed("plot", *folders, *options, "--out", picture)
    assert picture.read_bytes().startswith(PNG)
    assert "CartPole-v1: PPOPlus, 2 seeds" in output and f"Picture: {picture}" in output


def test_the_legend_names_the_experiments_with_their_number_of_seeds(runs: Path, tmp_path: Path) -> None:
    plot_curves(find_runs([runs]), tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert "<!-- PPOPlus (2 seeds) -->" in text and "<!-- A2CPlus (1 seed) -->" in text


def test_a_seed_that_ended_early_is_named(runs: Path, tmp_path: Path) -> None:
    short = Path(shutil.copytree(runs / "ppo0", tmp_path / "short"))
    (short / "progress.csv").unlink()
    lines = (short / "episodes.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (short / "episodes.csv").write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
    output = succeed("plot", runs / "ppo1", short, "--out", tmp_path / "curves.png")
    assert f"{short} ends at " in " ".join(output.split())


def test_a_run_without_a_finished_episode_is_named_and_left_out(runs: Path, tmp_path: Path) -> None:
    begun = variant(runs / "ppo0", tmp_path / "begun", n_epochs=7)
    (begun / "episodes.csv").write_text("step,return,length,seconds\n", encoding="utf-8")
    output = " ".join(succeed("plot", runs / "ppo0", runs / "ppo1", begun, "--out", tmp_path / "curves.png").split())
    assert f"{begun} is left out: no training episode has ended" in output and "CartPole-v1: PPOPlus, 2 seeds" in output
    result = run("plot", begun, "--out", tmp_path / "none.png")
    assert result.exit_code == 2 and "none of these runs has a learning curve" in " ".join(result.output.split())
    assert not (tmp_path / "none.png").exists()


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--x", "hours"), "--x must be steps or time, got 'hours'"),
        (("--out", "curves.gif"), "curves.gif must end in .png, .svg, .pdf"),
        (("--evaluations", "--metrics"), "give one of them"),
        (("--evaluations",), "has no evaluations.npz: train with --eval-freq"),
    ],
)
def test_wrong_options_are_explained(
    runs: Path, options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("plot", runs, *options)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    result = run("plot", tmp_path)
    assert result.exit_code == 2 and "there is no config.yml in it" in " ".join(result.output.split())


def test_runs_that_do_not_know_their_time_are_refused_on_the_time_axis() -> None:
    without = Series(np.array([1.0, 2.0]), np.array([1.0, 2.0]), np.full(2, np.nan))
    with pytest.raises(ConfigError, match="--x steps can be drawn"):
        on_common_points([without], "time")
