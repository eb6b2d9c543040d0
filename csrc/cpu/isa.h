// Which kernels this process runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace mdkv {

// The widest that the build and the machine have, or what MDKV_CPU_ISA names
// (avx512, avx2 or portable).
const Kernels& machine_kernels();

// Instruction sets that the build and the machine have, widest first.
std::vector<std::string> available_isas();

}  // namespace mdkv
