"""A CUDA driver that launches nothing, so that Triton's launcher runs on a machine without a GPU.

Everything up to the driver's own launch happens: the kernels are compiled for compute capability
9.0, the launcher unpacks its arguments and calls the driver. Tensors lie on the CPU.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

CAPABILITY = (9, 0)
MULTIPROCESSORS = 132
_SOURCE = r"""
#include <string.h>
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Config;
int launches, wanted, attributes;
unsigned grid;
unsigned long long parameters[64];
int cuLaunchKernelEx(const Config *config, void *function, void **given, void **extra) {
  launches++, grid = config->grid[0], attributes = config->count;
  for (int i = 0; i < wanted; i++) memcpy(parameters + i, given[i], 8);
  return 0;
}
int cuFuncGetAttribute(int *value, int which, void *function) {
  return *value = which == 4 ? 128 : which == 0 ? 1024 : 0, 0;  // registers, threads
}
int cuDeviceGetAttribute(int *value, int which, int device) { return *value = 232448, 0; }
int cuPointerGetAttribute(void **value, int which, void *pointer) { return *value = pointer, 0; }
int cuCtxGetCurrent(void **context) { return *context = &launches, 0; }
int cuModuleLoadData(void **module, const void *image) { return *module = &launches, 0; }
int cuModuleGetFunction(void **it, void *module, const char *name) { return *it = &launches, 0; }
int cuGetErrorString(int error, const char **text) { return *text = "", 0; }
"""
_NOTHING = (
    *("cuCtxGetDevice", "cuCtxGetLimit", "cuCtxSetCurrent", "cuCtxSetLimit", "cuDeviceGet"),
    *("cuDevicePrimaryCtxRetain", "cuDriverGetVersion", "cuFuncSetAttribute", "cuModuleUnload"),
    *("cuFuncSetCacheConfig", "cuOccupancyMaxActiveClusters", "cuStreamIsCapturing"),
    "cuTensorMapEncodeTiled",
)


def load() -> ctypes.CDLL:
    """The driver, compiled into a folder of its own, where Triton's launcher is linked with it."""
    folder = Path(tempfile.mkdtemp(prefix="dwl-kernels-driver-"))
    library = folder / "libcuda.so.1"
    source = _SOURCE + "".join(f"int {name}() {{ return 0; }}\n" for name in _NOTHING)
    command = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*command, "-x", "c", "-"], input=source.encode(), check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@contextmanager
def recording() -> Iterator[ctypes.CDLL]:
    """Let backend "triton" take CPU tensors as if they were on a device, and launch nothing."""
    driver = load()
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver as active

    from dwl_kernels import backends

    class Recorder(CudaDriver):
        def __init__(self) -> None:
            self.utils = CudaUtils()
            self.launcher_cls = CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: CAPABILITY

    properties = SimpleNamespace(
        name="recorder",
        multi_processor_count=MULTIPROCESSORS,
        shared_memory_per_multiprocessor=233472,
    )
    replaced: list[tuple[Any, dict[str, Any]]] = [
        (torch.cuda, {"get_device_capability": lambda device=None: CAPABILITY}),
        (torch.cuda, {"get_device_properties": lambda device: properties}),
        (
            backends.triton_backend,
            {"unavailable_reason": lambda device: None, "checks_values": lambda device: False},
        ),
        (
            torch.cuda,
            {"current_device": lambda: None, "is_current_stream_capturing": lambda: False},
        ),
        (torch.cuda, {"current_stream": lambda device: None, "stream": nullcontext}),
        (backends, {"scaled": backends.triton_backend.scaled}),
    ]
    active.set_active(Recorder())
    with ExitStack() as stack:
        for module, names in replaced:
            stack.enter_context(patch.multiple(module, **names))
        yield driver
