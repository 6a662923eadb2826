"""A CUDA driver that does nothing, so that Triton's own launcher runs on a machine without a GPU.

Triton reaches the driver through libcuda.so.1. `no_op_driver` compiles a library of that name in which every function that Triton
calls returns success at once, loads it, and makes Triton believe in a card. Kernels are compiled for that card, bound and launched by
Triton's code unchanged; the launch arrives here, is counted, and that is all. So the CPU time of a launch can be measured, without the
about 2 us that the real driver takes.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import torch
import triton
from triton import knobs

ANSWERS = """
long launches = 0;
int cuLaunchKernelEx(void *config, void *function, void **params, void **extra) { launches++; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 227 * 1024; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuModuleLoadData(void **module, void *image) { *module = &launches; return 0; }
int cuModuleGetFunction(void **function, void *module, char *name) { *function = &launches; return 0; }
int cuCtxGetCurrent(void **context) { *context = &launches; return 0; }
"""


class NoOpDriver:
    """The library, loaded, and Triton's driver on top of it for the rest of the process."""

    def __init__(self, folder: Path, arch: int):
        """Raises OSError where there is no C compiler, or where a real driver is loaded."""
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise OSError("no C compiler (gcc or cc) is on the PATH")
        if torch.cuda.is_available():
            raise OSError("a real CUDA driver is loaded")
        from triton.backends.nvidia import driver

        calls = set(re.findall(r"\bcu[A-Z]\w+", (Path(driver.dirname) / "driver.c").read_text()))
        rest = sorted(name for name in calls if f" {name}(" not in ANSWERS)
        source, library = folder / "no_op.c", folder / "libcuda.so.1"
        source.write_text(ANSWERS + "".join(f"int {name}() {{ return 0; }}\n" for name in rest))
        soname = "-Wl,-soname,libcuda.so.1"
        subprocess.run([compiler, "-O1", "-w", "-shared", "-fPIC", soname, "-o", library, source], check=True)
        self.library = ctypes.CDLL(
            str(library), ctypes.RTLD_GLOBAL
        )  # whoever opens libcuda.so.1 from now on gets this one
        knobs.nvidia.libcuda_path = str(folder)
        active = driver.CudaDriver()
        active.get_current_device = lambda: 0
        active.get_current_stream = lambda device: 0
        active.get_device_capability = lambda device: divmod(arch, 10)
        triton.runtime.driver.set_active(active)

    @property
    def launches(self) -> int:
        """How many kernels were launched so far."""
        return ctypes.c_long.in_dll(self.library, "launches").value
