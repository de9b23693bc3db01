"""Build steps beyond pyproject.toml."""

from setuptools import setup

setup()
