"""The one build step beyond pyproject.toml: the compiled CPU kernel, where there is a compiler.

Without one the installation succeeds all the same; the kernel is then compiled at first use, or
replaced by plain torch.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("belief_dist", "kernels")

# Loaded by path: importing the package would need torch, which a build environment lacks.
spec = importlib.util.spec_from_file_location("build", KERNELS / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


class BuildKernel(build_ext):
    """Builds a plain shared library: the kernel has no Python entry point."""

    def build_extension(self, ext: Extension) -> None:
        """Compile as at first use, so that both give the same library."""
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            build.compile_library(build.compiler(), path)
        except build.Unavailable as reason:
            self.warn(f"no compiled CPU kernel: {reason}")


setup(
    ext_modules=[
        Extension(
            "belief_dist.kernels._cpu_kernel",
            [str(KERNELS / source.name) for source in build.SOURCES],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernel},
)
