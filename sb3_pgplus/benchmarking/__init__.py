"""
Learning curves of many tasks and seeds, with statistics: ``sb3-pgplus benchmark``.

:mod:`~sb3_pgplus.benchmarking.suites` says what is trained, :mod:`~sb3_pgplus.benchmarking.runner` trains it,
:mod:`~sb3_pgplus.benchmarking.store` keeps one file for each run, and :mod:`~sb3_pgplus.benchmarking.page` makes tables
and figures of the files. Needs the extra ``report`` for the last.
"""
