// The Python module cellops._C: the only file that knows pybind11. Tensors arrive as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cellops.h"

namespace py = pybind11;
using namespace cellops;

namespace {

template <class T = const void*>
T pointer(uintptr_t address) {
  return reinterpret_cast<T>(address);
}

DeformConv2dParams make_deform_conv2d_params(int64_t batch, int64_t in_channels, int64_t in_height, int64_t in_width,
                                             int64_t out_channels, int64_t out_height, int64_t out_width,
                                             int64_t kernel_height, int64_t kernel_width, int64_t stride_height,
                                             int64_t stride_width, int64_t pad_height, int64_t pad_width,
                                             int64_t dilation_height, int64_t dilation_width, int64_t groups,
                                             int64_t offset_groups, int dtype, int offset_dtype,
                                             bool input_channels_last, bool offset_channels_last,
                                             bool mask_channels_last, bool weight_channels_last,
                                             bool output_channels_last) {
  return {batch,          in_channels,         in_height,            in_width,           out_channels,
          out_height,     out_width,           kernel_height,        kernel_width,       stride_height,
          stride_width,   pad_height,          pad_width,            dilation_height,    dilation_width,
          groups,         offset_groups,       Dtype(dtype),         Dtype(offset_dtype), input_channels_last,
          offset_channels_last, mask_channels_last, weight_channels_last, output_channels_last};
}

void deform_conv2d_forward(const DeformConv2dParams& params, int threads, uintptr_t input, uintptr_t offset,
                           uintptr_t mask, uintptr_t weight, uintptr_t bias, uintptr_t output) {
  py::gil_scoped_release release;
  deform_conv2d_forward_cpu(
      params, {pointer(input), pointer(offset), pointer(mask), pointer(weight), pointer(bias), pointer<void*>(output)},
      threads);
}

void deform_conv2d_backward(const DeformConv2dParams& params, int threads, uintptr_t grad_output, uintptr_t input,
                            uintptr_t offset, uintptr_t mask, uintptr_t weight, uintptr_t grad_input,
                            uintptr_t grad_offset, uintptr_t grad_mask, uintptr_t grad_weight, uintptr_t grad_bias) {
  py::gil_scoped_release release;
  deform_conv2d_backward_cpu(
      params,
      {pointer(grad_output), pointer(input), pointer(offset), pointer(mask), pointer(weight),
       pointer<void*>(grad_input), pointer<void*>(grad_offset), pointer<void*>(grad_mask), pointer<void*>(grad_weight),
       pointer<void*>(grad_bias)},
      threads);
}

py::dict isa_variants() {
  py::dict variants;
  for (int i = 0; i < isa_count(); ++i) variants[isa_name_at(i)] = isa_supported(i);
  return variants;
}

std::map<std::string, std::string> build_info() {
  return {{"version", CELLOPS_VERSION}, {"compiler", CELLOPS_COMPILER}, {"cuda", CELLOPS_CUDA_INFO}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  isa_name();  // an unusable CELLOPS_ISA fails the import

  m.doc() = "Native kernels of cellops.";
  m.def("isa", &isa_name, "The instruction-set variant in use.");
  m.def("isa_variants", &isa_variants, "Compiled variants, best last: whether this CPU can run them.");
  m.def("build_info", &build_info, "Version, compiler and CUDA state of this build.");

  py::class_<DeformConv2dParams>(m, "DeformConv2dParams")
      .def(py::init(&make_deform_conv2d_params), py::kw_only(), py::arg("batch"), py::arg("in_channels"),
           py::arg("in_height"), py::arg("in_width"), py::arg("out_channels"), py::arg("out_height"),
           py::arg("out_width"), py::arg("kernel_height"), py::arg("kernel_width"), py::arg("stride_height"),
           py::arg("stride_width"), py::arg("pad_height"), py::arg("pad_width"), py::arg("dilation_height"),
           py::arg("dilation_width"), py::arg("groups"), py::arg("offset_groups"), py::arg("dtype"),
           py::arg("offset_dtype"), py::arg("input_channels_last"), py::arg("offset_channels_last"),
           py::arg("mask_channels_last"), py::arg("weight_channels_last"), py::arg("output_channels_last"));
  m.def("deform_conv2d_forward_cpu", &deform_conv2d_forward);
  m.def("deform_conv2d_backward_cpu", &deform_conv2d_backward);
}
