// Chooses the instruction-set variant of the CPU kernels at load and sends every entry point of ops.inc to it.
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "../cellops.h"

namespace cellops {
namespace {

struct Table {
  const char* isa;
  bool supported;
#define X(name, Params, Tensors) bool (*name)(const Params&, const Tensors&, int);
#include "ops.inc"
#undef X
};

}  // namespace

#ifdef CELLOPS_VARIANT_baseline
#define CELLOPS_TABLE_ISA baseline
#include "table.inc"
#endif
#ifdef CELLOPS_VARIANT_avx2
#define CELLOPS_TABLE_ISA avx2
#include "table.inc"
#endif
#ifdef CELLOPS_VARIANT_avx512
#define CELLOPS_TABLE_ISA avx512
#include "table.inc"
#endif
#ifdef CELLOPS_VARIANT_avx512_bf16
#define CELLOPS_TABLE_ISA avx512_bf16
#include "table.inc"
#endif
#ifdef CELLOPS_VARIANT_neon
#define CELLOPS_TABLE_ISA neon
#include "table.inc"
#endif

namespace {

#if defined(__x86_64__)
bool has_avx2() {
#if defined(__clang__) || __GNUC__ >= 11  // older compilers cannot ask for f16c; every CPU with AVX2 has had it
  if (!__builtin_cpu_supports("f16c")) return false;
#endif
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Best last.
const Table kTables[] = {
#ifdef CELLOPS_VARIANT_baseline
    baseline::table(true),
#endif
#ifdef CELLOPS_VARIANT_avx2
    avx2::table(has_avx2()),
#endif
#ifdef CELLOPS_VARIANT_avx512
    avx512::table(has_avx512()),
#endif
#ifdef CELLOPS_VARIANT_avx512_bf16
    avx512_bf16::table(has_avx512_bf16()),
#endif
#ifdef CELLOPS_VARIANT_neon
    neon::table(true),
#endif
};
constexpr int kTableCount = int(sizeof(kTables) / sizeof(kTables[0]));

const Table& choose() {
  const char* wanted = std::getenv("CELLOPS_ISA");
  std::string names;
  for (int i = kTableCount - 1; i >= 0; --i) {
    const Table& table = kTables[i];
    if (!wanted || !*wanted) {
      if (table.supported) return table;
    } else if (std::strcmp(wanted, table.isa) == 0) {
      if (table.supported) return table;
      throw std::runtime_error("CELLOPS_ISA=" + std::string(wanted) + ": this CPU does not have that instruction set");
    }
    names += std::string(names.empty() ? "" : ", ") + table.isa;
  }
  throw std::runtime_error("CELLOPS_ISA=" + std::string(wanted ? wanted : "") +
                           ": no such instruction-set variant was compiled; there are: " + names);
}

const Table& table() {
  static const Table& chosen = choose();
  return chosen;
}

}  // namespace

#define X(name, Params, Tensors)                                               \
  void name##_cpu(const Params& params, const Tensors& tensors, int threads) { \
    if (!table().name(params, tensors, threads)) throw std::bad_alloc();       \
  }
#include "ops.inc"
#undef X

int isa_count() { return kTableCount; }
const char* isa_name_at(int index) { return kTables[index].isa; }
bool isa_supported(int index) { return kTables[index].supported; }
const char* isa_name() { return table().isa; }

}  // namespace cellops
