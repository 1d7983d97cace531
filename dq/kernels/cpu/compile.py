"""Build the native kernels: `python -m dq.kernels.cpu.compile [OUT]`. Called at install; needs a C++20 compiler.

Stands alone (no imports of dq or torch), because a build runs before either is there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "libdq_cpu.so"
FLAGS = ("-std=c++20", "-O3", "-fopenmp", "-fPIC", "-fno-math-errno", "-fvisibility=default")
SANITIZED = ("-g", "-O1", "-fsanitize=address", "-fno-omit-frame-pointer")


def sources() -> list[Path]:
    """C++ files of the library."""
    return sorted((HERE / "native").glob("*.cpp"))


def fingerprint() -> str:
    """Changes when any source or header does; built into the library, so that a stale one is never called."""
    files = [*sources(), *sorted((HERE / "native").glob("*.h"))]
    return f"{zlib.crc32(b''.join(path.read_bytes() for path in files)):08x}"


def build(out: Path = LIBRARY, extra: tuple[str, ...] = ()) -> None:
    """Compile every source into one shared object, put in place when whole. RuntimeError says why it cannot."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("no C++ compiler (g++ or clang++) was found")
    with tempfile.TemporaryDirectory(dir=out.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        made = Path(folder) / out.name
        options = [compiler, *FLAGS, *extra, f'-DDQ_FINGERPRINT="{fingerprint()}"']

        def object_of(source: Path) -> str:
            found = str(Path(folder) / f"{source.stem}.o")
            _run([*options, "-c", str(source), "-o", found])
            return found

        _run([*options, "-shared", *pool.map(object_of, sources()), "-o", str(made)])
        made.replace(out)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[:400] or 'no message'}")


def main() -> None:
    arguments = [text for text in sys.argv[1:] if text != "--sanitize"]
    out = Path(arguments[0]).resolve() if arguments else LIBRARY
    try:
        build(out, SANITIZED if "--sanitize" in sys.argv else ())
    except RuntimeError as error:
        sys.exit(f"native kernels not built: {error}; dq runs on torch's own ops instead")
    print(f"built {out.name}")


if __name__ == "__main__":
    main()
