// The Python module cellops._C: the only file that knows pybind11. Tensors arrive as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <utility>

#include "cellops.h"

namespace py = pybind11;
using namespace cellops;

namespace {

// A tensor's address, 0 for an absent one.
struct Address {
  uintptr_t value;
  operator void*() const { return reinterpret_cast<void*>(value); }
};
template <size_t>
using AddressOf = uintptr_t;

// Binds an entry point as f(params, threads, *addresses), the addresses in the order of the fields of Tensors.
template <class Params, class Tensors, size_t... I>
void bind(py::module_& m, const char* name, void (*kernel)(const Params&, const Tensors&, int),
          std::index_sequence<I...>) {
  m.def(name, [kernel](const Params& params, int threads, AddressOf<I>... addresses) {
    py::gil_scoped_release release;
    kernel(params, Tensors{Address{addresses}...}, threads);
  });
}

DeformConv2dParams make_deform_conv2d_params(
    int64_t batch, int64_t in_channels, int64_t in_height, int64_t in_width, int64_t out_channels, int64_t out_height,
    int64_t out_width, int64_t kernel_height, int64_t kernel_width, int64_t stride_height, int64_t stride_width,
    int64_t pad_height, int64_t pad_width, int64_t dilation_height, int64_t dilation_width, int64_t groups,
    int64_t offset_groups, int dtype, int offset_dtype, bool input_channels_last, bool offset_channels_last,
    bool mask_channels_last, bool weight_channels_last, bool output_channels_last) {
  return {batch,
          in_channels,
          in_height,
          in_width,
          out_channels,
          out_height,
          out_width,
          kernel_height,
          kernel_width,
          stride_height,
          stride_width,
          pad_height,
          pad_width,
          dilation_height,
          dilation_width,
          groups,
          offset_groups,
          Dtype(dtype),
          Dtype(offset_dtype),
          input_channels_last,
          offset_channels_last,
          mask_channels_last,
          weight_channels_last,
          output_channels_last};
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
  py::class_<SqueezeExciteParams>(m, "SqueezeExciteParams")
      .def(py::init([](int64_t batch, int64_t channels, int64_t pixels, int64_t hidden, int activation, int gate,
                       int dtype, bool channels_last) {
             return SqueezeExciteParams{batch,      channels,     pixels,       hidden, Activation(activation),
                                        Gate(gate), Dtype(dtype), channels_last};
           }),
           py::kw_only(), py::arg("batch"), py::arg("channels"), py::arg("pixels"), py::arg("hidden"),
           py::arg("activation"), py::arg("gate"), py::arg("dtype"), py::arg("channels_last"));
  py::class_<EcaParams>(m, "EcaParams")
      .def(py::init([](int64_t batch, int64_t channels, int64_t pixels, int64_t taps, int dtype, bool channels_last) {
             return EcaParams{batch, channels, pixels, taps, Dtype(dtype), channels_last};
           }),
           py::kw_only(), py::arg("batch"), py::arg("channels"), py::arg("pixels"), py::arg("taps"), py::arg("dtype"),
           py::arg("channels_last"));

#define X(name, Params, Tensors) \
  bind<Params, Tensors>(m, #name "_cpu", &name##_cpu, std::make_index_sequence<sizeof(Tensors) / sizeof(void*)>{});
#include "cpu/ops.inc"
#undef X
}
