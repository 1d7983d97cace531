"""Install-time build of the native CPU kernels. Without a compiler the package installs too, on torch's ops."""

import importlib.util
import sys
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).resolve().parent / "dq" / "kernels" / "cpu"


class NativeKernels(BuildHookInterface):
    """Compiles dq/kernels/cpu/native into one shared object and, where that works, ships it in the wheel."""

    def initialize(self, version: str, build_data: dict) -> None:
        spec = importlib.util.spec_from_file_location("dq_compile", HERE / "compile.py")
        compile_ = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compile_)
        try:
            compile_.build()
        except RuntimeError as error:
            print(f"dq: native kernels not built ({error}); torch's own ops serve instead", file=sys.stderr)
            return
        build_data["artifacts"].append(f"dq/kernels/cpu/{compile_.LIBRARY.name}")
        build_data["pure_python"], build_data["infer_tag"] = False, True
