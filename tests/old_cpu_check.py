"""Loads the library by its path alone and checks one convolution; tests/test_emulated_cpus.py runs it on an old CPU.

python tests/old_cpu_check.py path/to/_C.so
"""

import ctypes
import importlib.util
import random
import sys

spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)

CHANNELS, HEIGHT, WIDTH, OUT = 5, 4, 3, 7
random.seed(0)


def numbers(count, value=None):
    return (ctypes.c_float * count)(*[random.random() if value is None else value for _ in range(count)])


tensors = {
    "input": numbers(CHANNELS * HEIGHT * WIDTH),
    "offset": numbers(18 * HEIGHT * WIDTH, 0.0),
    "mask": numbers(9 * HEIGHT * WIDTH, 1.0),
    "weight": numbers(OUT * CHANNELS * 9),
    "bias": numbers(OUT),
    "output": numbers(OUT * HEIGHT * WIDTH),
}
sizes = {"batch": 1, "in_channels": CHANNELS, "out_channels": OUT, "groups": 1, "offset_groups": 1}
for axis, size in (("height", HEIGHT), ("width", WIDTH)):
    sizes |= {f"in_{axis}": size, f"out_{axis}": size, f"kernel_{axis}": 3}
    sizes |= {f"{name}_{axis}": 1 for name in ("stride", "pad", "dilation")}
layouts = {f"{name}_channels_last": False for name in ("input", "offset", "mask", "weight", "output")}
params = library.DeformConv2dParams(**sizes, dtype=0, offset_dtype=0, **layouts)
library.deform_conv2d_forward_cpu(params, 2, *map(ctypes.addressof, tensors.values()))

error = 0.0
for out in range(OUT):
    for y in range(HEIGHT):
        for x in range(WIDTH):
            total = tensors["bias"][out]
            for tap in range(CHANNELS * 9):
                row, column = y - 1 + tap % 9 // 3, x - 1 + tap % 3
                if 0 <= row < HEIGHT and 0 <= column < WIDTH:
                    pixel = tap // 9 * HEIGHT * WIDTH + row * WIDTH + column
                    total += tensors["weight"][out * CHANNELS * 9 + tap] * tensors["input"][pixel]
            error = max(error, abs(total - tensors["output"][(out * HEIGHT + y) * WIDTH + x]))
print(library.isa(), f"{error:.1e}")
sys.exit(not error < 1e-5)
