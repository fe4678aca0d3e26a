"""What a run leaves to look at: learning curves; plotting packages are imported only when something is drawn."""

from sb3_pgplus.reporting.learning_curve import Episodes, plot_learning_curve, read_episodes, smooth

__all__ = ["Episodes", "plot_learning_curve", "read_episodes", "smooth"]
