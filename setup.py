"""Builds the extension; everything else about the package is in pyproject.toml."""

import os

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# Warnings are errors where KTLS_WERROR is set (CI), never for someone who installs.
warnings = ["-Wall", "-Wextra"] + (["-Werror"] if os.environ.get("KTLS_WERROR") else [])

setup(
    ext_modules=[
        Pybind11Extension(
            "ktls._ktls",
            ["src/_ktls.cpp", "src/_lane.c", "src/_by_lane.c", "src/_intake.c", "src/ktls.c"],
            include_dirs=["src"],
            depends=["src/ktls.h", "src/_lane.h"],
            extra_compile_args=warnings,
        )
    ],
)
