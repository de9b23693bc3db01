"""The error raised when a job cannot start."""


class LaunchError(RuntimeError):
    """The environment does not determine this process's rank, or the ranks do not match."""
