#include "isa.h"

#include <c10/util/Exception.h>

#include <cstdlib>

namespace mdkv {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

std::vector<const Kernels*> candidates() {
  std::vector<const Kernels*> found;
  if (has_avx512() && avx512_kernels() != nullptr) found.push_back(avx512_kernels());
  if (has_avx2() && avx2_kernels() != nullptr) found.push_back(avx2_kernels());
  found.push_back(portable_kernels());
  return found;
}

const Kernels* choose() {
  const char* forced = std::getenv("MDKV_CPU_ISA");
  if (forced == nullptr) return candidates().front();
  for (const Kernels* kernels : candidates()) {
    if (std::string(forced) == kernels->isa) return kernels;
  }
  TORCH_CHECK(false, "MDKV_CPU_ISA=", forced,
              " names no instruction set of this machine; choose avx512, avx2 or portable");
}

}  // namespace

const Kernels& machine_kernels() {
  static const Kernels* kernels = choose();
  return *kernels;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : candidates()) names.push_back(kernels->isa);
  return names;
}

}  // namespace mdkv
