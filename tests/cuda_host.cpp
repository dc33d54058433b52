// A library with the entry points of csrc/cuda/ops.inc that runs their bodies on the CPU; tests/test_cuda.py loads it.
#include "cuda_host.h"

#include <cstdio>
#include <iterator>
#include <string>
#include <type_traits>
#include <utility>

#include "../csrc/cuda/deform_conv2d.h"
#include "../csrc/cuda/deform_conv2d_scatter.h"
#include "../csrc/cuda/fixed_point.h"
#include "../csrc/cuda/frelu.h"
#include "../csrc/cuda/offset_sample2d_region.h"

namespace cellops {
namespace {

// A number from Python for a field of any kind.
struct Number {
  double value;
  template <class Field>
  operator Field() const {
    if constexpr (std::is_enum_v<Field>) {
      return static_cast<Field>(int(value));
    } else {
      return static_cast<Field>(value);
    }
  }
};

template <class Params, size_t... I>
Params params_of(const double* fields, std::index_sequence<I...>) {
  return Params{Number{fields[I]}...};
}

template <class Tensors, size_t... I>
Tensors tensors_of(void* const* addresses, std::index_sequence<I...>) {
  return Tensors{addresses[I]...};
}

std::string error;

}  // namespace
}  // namespace cellops

using namespace cellops;

extern "C" {

void set_reversed(int value) { device::reversed() = value; }

// The names of a Params struct's fields in their order, for one entry point; null where there is no such entry point.
const char* fields_of(const char* name) {
  static std::string names;
  names.clear();
#define X(entry, Params, Tensors)  \
  if (std::string(name) == #entry) \
    for (const char* field : Params::kFields) names += std::string(field) + " ";
#include "../csrc/cuda/ops.inc"
#undef X
  return names.empty() ? nullptr : names.c_str();
}

// Runs an entry point; returns what went wrong, or null.
const char* call(const char* name, const double* fields, void* const* addresses, int count) {
  try {
#define X(entry, Params, Tensors)                                                                              \
  if (std::string(name) == #entry) {                                                                           \
    if (count != int(sizeof(Tensors) / sizeof(void*))) return "another number of addresses is wanted";         \
    device::entry(params_of<Params>(fields, std::make_index_sequence<std::size(Params::kFields)>{}),           \
                  tensors_of<Tensors>(addresses, std::make_index_sequence<sizeof(Tensors) / sizeof(void*)>{}), \
                  device::HostLauncher{});                                                                     \
    return nullptr;                                                                                            \
  }
#include "../csrc/cuda/ops.inc"
#undef X
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
  return "no such entry point";
}

}  // extern "C"
