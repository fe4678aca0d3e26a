"""Learning curves: the smoothing is right, and the same picture comes from memory, a folder or SB3's own CSV."""

import sys
from pathlib import Path

import numpy as np
import pytest

from sb3_pgplus.reporting import Episodes, plot_learning_curve, read_episodes, smooth

PNG = b"\x89PNG\r\n\x1a\n"


def write_episodes(folder: Path, n: int = 40) -> Episodes:
    rows = [(10 * (i + 1), float(np.sin(i)), 10) for i in range(n)]
    text = "step,return,length,seconds\n" + "".join(f"{s},{r!r},{length},0.5\n" for s, r, length in rows)
    (folder / "episodes.csv").write_text(text, encoding="utf-8")
    return Episodes(*map(list, zip(*rows, strict=True)))  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [1, 3, 50])
def test_smoothing_is_the_mean_and_spread_of_the_last_values_only(window: int) -> None:
    values = np.random.default_rng(0).normal(size=20)
    mean, std = smooth(values, window)
    for i in range(20):
        last = values[max(0, i - window + 1) : i + 1]
        assert mean[i] == pytest.approx(last.mean())
        assert std[i] == pytest.approx(last.std(), abs=1e-7)


def test_smoothing_by_hand() -> None:
    mean, std = smooth([1.0, 3.0, 5.0], window=2)
    assert mean.tolist() == pytest.approx([1.0, 2.0, 4.0])
    assert std.tolist() == pytest.approx([0.0, 1.0, 1.0])


def test_smoothing_keeps_its_digits_far_from_zero() -> None:
    _, std = smooth(1e8 + np.tile([-1.0, 1.0], 50), window=10)
    assert std[-1] == pytest.approx(1.0, rel=1e-6)


def test_smoothing_nothing_gives_nothing() -> None:
    assert [part.size for part in smooth([], window=5)] == [0, 0]


def test_a_return_that_is_no_number_is_left_out_of_the_means_around_it() -> None:
    mean, std = smooth([1.0, np.nan, 3.0, 5.0, np.inf, -np.inf], window=2)
    assert np.allclose(mean, [1.0, 1.0, 3.0, 4.0, 5.0, np.nan], equal_nan=True)
    assert np.allclose(std, [0.0, 0.0, 0.0, 1.0, 0.0, np.nan], equal_nan=True)


def test_a_curve_from_memory_a_folder_and_its_csv_is_the_same_picture(tmp_path: Path) -> None:
    episodes = write_episodes(tmp_path)
    assert read_episodes(tmp_path / "episodes.csv") == episodes
    sources = {"memory": episodes, "folder": tmp_path, "file": str(tmp_path / "episodes.csv")}
    pictures = [
        plot_learning_curve(source, tmp_path / f"{name}.png", title="t", subtitle="s").read_bytes()
        for name, source in sources.items()
    ]
    assert pictures[0].startswith(PNG)
    assert pictures[0] == pictures[1] == pictures[2]


def test_a_curve_from_sb3s_progress_csv(tmp_path: Path) -> None:
    path = tmp_path / "progress.csv"
    path.write_text("time/total_timesteps,rollout/ep_rew_mean\n100,\n200,1.5\n300,2.5\n", encoding="utf-8")
    assert plot_learning_curve(path, tmp_path / "curve.png").read_bytes().startswith(PNG)


def test_nothing_to_draw_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no episode has ended"):
        plot_learning_curve(Episodes(), tmp_path / "curve.png")
    path = tmp_path / "progress.csv"
    path.write_text("time/total_timesteps\n100\n", encoding="utf-8")
    with pytest.raises(ValueError, match="rollout/ep_rew_mean"):
        plot_learning_curve(path, tmp_path / "curve.png")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "sb3_pgplus\[report\]"'):
        plot_learning_curve(write_episodes(tmp_path), tmp_path / "curve.png")
