"""GPU kernels in Triton, one file per op. Nothing here is imported before a call takes the "triton" backend.

`<op>_forward_triton` takes what the op's formula in `cellops/reference/<op>.py` takes, `<op>_backward_triton` what the
backward op takes, with tensors that are dense in one of the two memory formats. Both return new tensors.
"""
