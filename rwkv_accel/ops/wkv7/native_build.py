"""Compiles native.cpp at its first use, for the CPU at hand, and keeps the library for later runs.

A library's name holds a hash of the source and of all that the compiler says of itself and of the CPU, so a home shared
by different machines holds one library for each kind, and a new release compiles anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from rwkv_accel.runtime import cache_folder, cpp_compiler

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")
CHUNK_VALUES = 4096
"""Of one input in a chunk of one head: 16 KiB, so that a chunk's inputs and gradients stay in the cache."""
SECONDS_TO_COMPILE = 300


class BuildError(Exception):
    """Why the library cannot be had, in one line."""


def chunk_tokens(head_size: int) -> int:
    """Tokens between two states that are kept."""
    return max(1, CHUNK_VALUES // head_size)


@cache
def library(head_size: int) -> ctypes.CDLL:
    """The compiled functions for a head size. Raises BuildError."""
    path = library_path(head_size)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error})") from error


def library_path(head_size: int) -> Path:
    """Where the library is, compiled if it was not there. Raises BuildError."""
    compiler = cpp_compiler()
    if compiler is None:
        raise BuildError("there is no C++ compiler (g++, clang++ or $CXX)")
    sizes = (f"-DHEAD_SIZE={head_size}", f"-DCHUNK={chunk_tokens(head_size)}")
    cpu_flag, known = _of_this_cpu(compiler)
    digest = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), *(x.encode() for x in (*FLAGS, *sizes)), known]))
    path = cache_folder() / f"wkv7-{digest.hexdigest()[:16]}.so"
    if not path.is_file():
        _compile([compiler, *FLAGS, cpu_flag, *sizes, str(SOURCE)], path)
    return path


def _of_this_cpu(compiler: str) -> tuple[str, bytes]:
    """The flag for this CPU's instructions, and all macros that the compiler defines under it."""
    for flag in ("-march=native", "-mcpu=native"):
        done = _run([compiler, flag, "-dM", "-E", "-x", "c++", os.devnull])
        if done.returncode == 0:
            return flag, done.stdout
    raise BuildError(f"{compiler} knows neither -march=native nor -mcpu=native ({_complaint(done)})")


def _compile(command: list[str], path: Path) -> None:
    logger.info("compiling wkv7 for this CPU, once: %s", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, then renamed: other processes may be doing the same.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = str(Path(folder) / path.name)
            done = _run([*command, "-fopenmp", "-o", made])
            if done.returncode:
                problem = _complaint(done)
                done = _run([*command, "-o", made])
                if done.returncode == 0:
                    logger.warning("wkv7 runs on one thread: %s has no OpenMP (%s)", command[0], problem)
            if done.returncode:
                raise BuildError(f"{command[0]} fails ({_complaint(done)})")
            os.replace(made, path)
    except OSError as error:
        raise BuildError(f"{path.parent} cannot be written ({error.strerror})") from error


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, timeout=SECONDS_TO_COMPILE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run ({error})") from error


def _complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode(errors="replace").splitlines()
    return next((line for line in lines if "error" in line), f"exit code {done.returncode}").strip()
