"""python -m cellops.testing.compile_kernels ARCH [OP ...]: what each Triton kernel compiles to (`_compile_kernels.py`).

The function `cellops.testing.compile_kernels` gives the same as rows. This file is to be run, not imported: a module of
that name would hide the function.
"""

from cellops.testing._compile_kernels import main

if __name__ == "__main__":
    main()
