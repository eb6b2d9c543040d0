// Splits a mixed_decode call over threads.
#pragma once

#include "kernels.h"

namespace mdkv {

// Reads the page tables, checks them, and runs every unit of the call.
void run_decode(const DecodeArgs& args, const Kernels& kernels);

}  // namespace mdkv
