// Chooses the instruction-set variant of the CPU kernels at load and sends every entry point of ops.inc to it.
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef CELLOPS_WITH_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#ifdef CELLOPS_WITH_AMX
namespace avx512_bf16 {
bool uses_tiles = false;
}
#endif
#ifdef CELLOPS_VARIANT_neon
#define CELLOPS_TABLE_ISA neon
#include "table.inc"
#endif

namespace {

#if defined(__x86_64__)
// Clang 14 and GCC 10 have no name for it that __builtin_cpu_supports takes.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
bool has_avx2() { return has_f16c() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#ifdef CELLOPS_WITH_AMX
// Linux keeps the tiles' 8 KiB for a thread only where the process has asked for it.
constexpr int kAskWhatThereIs = 0x1021, kAskFor = 0x1023, kTileData = 18;

bool has_amx_bf16() {
  unsigned a, b, c, d;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (kBfloat16 | kTiles)) return false;
  uint64_t there_is = 0;
  return syscall(SYS_arch_prctl, kAskWhatThereIs, &there_is) == 0 && there_is >> kTileData & 1;
}

// avx512_bf16, with products of bfloat16 in tiles.
Table amx_bf16_table() {
  Table table = avx512_bf16::table(has_amx_bf16());
  table.isa = "amx_bf16";
  return table;
}
bool allow_tiles() { return syscall(SYS_arch_prctl, kAskFor, kTileData) == 0; }
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
#ifdef CELLOPS_WITH_AMX
    amx_bf16_table(),
#endif
#ifdef CELLOPS_VARIANT_neon
    neon::table(true),
#endif
};
constexpr int kTableCount = int(sizeof(kTables) / sizeof(kTables[0]));

// Whether the CPU has the table's instruction set and the system lets this process use it.
bool start(const Table& table) {
  if (!table.supported) return false;
#ifdef CELLOPS_WITH_AMX
  if (std::strcmp(table.isa, "amx_bf16") == 0) return avx512_bf16::uses_tiles = allow_tiles();
#endif
  return true;
}

const Table& choose() {
  const char* wanted = std::getenv("CELLOPS_ISA");
  std::string names;
  for (int i = kTableCount - 1; i >= 0; --i) {
    const Table& table = kTables[i];
    if (!wanted || !*wanted) {
      if (start(table)) return table;
    } else if (std::strcmp(wanted, table.isa) == 0) {
      if (start(table)) return table;
      throw std::runtime_error("CELLOPS_ISA=" + std::string(wanted) + ": this CPU does not have that instruction set");
    }
    names += std::string(names.empty() ? "" : ", ") + table.isa;
  }
  if (!wanted || !*wanted) {
    throw std::runtime_error("this CPU has none of the instruction sets that were compiled: " + names);
  }
  throw std::runtime_error("CELLOPS_ISA=" + std::string(wanted) +
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
