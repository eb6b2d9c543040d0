// The units of a mixed_decode call.
#pragma once

#include <vector>

#include "decode_args.h"

namespace mdkv {

// One unit per (query, KV head), with its lists read from the lease's page table. Throws where a
// table or a block id points outside the cache.
std::vector<Unit> read_units(const DecodeArgs& args);

}  // namespace mdkv
