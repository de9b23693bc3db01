"""The one build step beyond pyproject.toml: the compiled CPU kernel, where there is a compiler.

Without one the installation succeeds all the same; the kernel is then compiled at first use, or
replaced by plain torch. One wheel with it serves every Python: it has no Python entry point.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("belief_dist", "kernels")

# Loaded by path: importing the package would need torch, which a build environment lacks.
spec = importlib.util.spec_from_file_location("build", KERNELS / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


class BuildKernel(build_ext):
    """Builds a plain shared library."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name it without the Python that builds it."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile as at first use, so that both give the same library."""
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            build.compile_library(build.compiler(), path)
        except build.Unavailable as reason:
            self.warn(f"no compiled CPU kernel: {reason}")


class Wheel(bdist_wheel):
    """Says that any Python on this platform can use what was built."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of the interpreter, its binary interface and the platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "belief_dist.kernels._cpu_kernel",
            [str(KERNELS / source.name) for source in build.SOURCES],
            optional=True,
        )
    ],
    cmdclass={"bdist_wheel": Wheel, "build_ext": BuildKernel},
)
