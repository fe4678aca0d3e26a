"""
Hyperparameter search with Optuna: ``sb3-pgplus tune``, :func:`tune` from Python, a callback for studies of your own.

Needs the extra ``tune``; the package itself never imports this one.
"""

try:
    import optuna as _optuna  # noqa: F401  # everything below stands on these two
    import scipy as _scipy  # noqa: F401
except ImportError as error:
    raise ImportError(f"tuning needs {error.name}: pip install 'sb3_pgplus[tune]'") from error

from sb3_pgplus.tuning.callback import OptunaCallback
from sb3_pgplus.tuning.plan import TuningPlan
from sb3_pgplus.tuning.study import TuningResult, tune

__all__ = ["OptunaCallback", "TuningPlan", "TuningResult", "tune"]
