// The units of a mixed_decode call.
#pragma once

#include <vector>

#include "decode_args.h"

namespace mdkv {

struct Units {
  std::vector<Unit> all;    // one per (query, KV head)
  std::vector<List> lists;  // of all units, which point to theirs
};

// Reads the units' lists from the page tables of their leases. Throws where leases are not in
// order, or a table or a block id points outside the cache.
Units read_units(const DecodeArgs& args);

}  // namespace mdkv
