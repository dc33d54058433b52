"""python -m cellops.testing ARCH [OP ...]: what each Triton kernel compiles to (`cellops.testing.compile_kernels`)."""

from cellops.testing._compile_kernels import main

main()
