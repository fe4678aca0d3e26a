"""The package's own exceptions. Each is a built-in one too, so that existing ``except`` clauses keep working."""


class HyperparameterError(ValueError, AssertionError):
    """
    A hyperparameter, or a combination of them, that cannot work.

    SB3 raises ``AssertionError`` in these places and RL Zoo prunes a trial on either, hence both.
    """


class NonFiniteEnvironmentError(ValueError):
    """An environment returned a NaN or infinite reward or observation."""


class NonFiniteUpdateError(ValueError):
    """Several updates in a row had a NaN or infinite loss or gradient. RL Zoo prunes a trial on ``ValueError``."""
