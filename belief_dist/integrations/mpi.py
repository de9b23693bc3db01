"""The former place of `belief_dist.mpi_backend`: importing it registers the backend, too."""

import warnings

import belief_dist.mpi_backend  # noqa: F401  (registers the backend)

warnings.warn(
    "belief_dist.integrations.mpi has moved: import belief_dist.mpi_backend.",
    FutureWarning,
    stacklevel=2,
)
