// The Python module cellops._C: the only file that knows pybind11. Tensors arrive as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <map>
#include <string>
#include <type_traits>
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

// A number from Python for a field of any kind: size, flag or enumeration.
struct Number {
  py::handle value;
  template <class Field>
  operator Field() const {
    if constexpr (std::is_floating_point_v<Field>) {
      return value.cast<Field>();
    } else {
      return static_cast<Field>(value.cast<int64_t>());
    }
  }
};

// The parameters' class, made from one keyword for each of Params::kFields.
template <class Params, size_t... I>
void define_params(py::module_& m, const char* name, std::index_sequence<I...>) {
  if (py::hasattr(m, name)) return;
  py::class_<Params>(m, name).def(py::init([](const py::kwargs& fields) {
    if (fields.size() != sizeof...(I)) throw py::type_error("one keyword for each field is wanted");
    return Params{Number{fields[Params::kFields[I]]}...};
  }));
}

// Binds an entry point as f(params, threads, *addresses), the addresses in the order of the fields of Tensors.
template <class Params, class Tensors, size_t... I>
void bind(py::module_& m, const char* name, void (*kernel)(const Params&, const Tensors&, int),
          std::index_sequence<I...>) {
  m.def(name, [kernel](const Params& params, int threads, AddressOf<I>... addresses) {
    py::gil_scoped_release release;
    kernel(params, Tensors{Address{addresses}...}, threads);
  });
}

// The same for the CUDA kernels, as f(params, device, stream, *addresses).
template <class Params, class Tensors, size_t... I>
void bind(py::module_& m, const char* name, void (*kernel)(const Params&, const Tensors&, int, void*),
          std::index_sequence<I...>) {
  m.def(name, [kernel](const Params& params, int device, uintptr_t stream, AddressOf<I>... addresses) {
    py::gil_scoped_release release;
    kernel(params, Tensors{Address{addresses}...}, device, reinterpret_cast<void*>(stream));
  });
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

#define X(name, Params, Tensors)                                                             \
  define_params<Params>(m, #Params, std::make_index_sequence<std::size(Params::kFields)>{}); \
  bind<Params, Tensors>(m, #name "_cpu", &name##_cpu, std::make_index_sequence<sizeof(Tensors) / sizeof(void*)>{});
#include "cpu/ops.inc"
#undef X

#ifdef CELLOPS_WITH_CUDA
#define X(name, Params, Tensors)                                                             \
  define_params<Params>(m, #Params, std::make_index_sequence<std::size(Params::kFields)>{}); \
  bind<Params, Tensors>(m, #name "_cuda", &name##_cuda, std::make_index_sequence<sizeof(Tensors) / sizeof(void*)>{});
#include "cuda/ops.inc"
#undef X
#endif
}
