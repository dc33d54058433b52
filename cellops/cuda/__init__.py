"""The CUDA C++ backend: launchers of the compiled library's kernels, with the signatures of the Triton ones.

Nothing here is imported before the backend is chosen. `docs/cuda.md` says what each kernel moves.
"""
