"""The error of a job that cannot start."""


class LaunchError(RuntimeError):
    """The environment does not tell one place among the ranks, or the ranks do not fit together."""
