// What a read_leases call asks for, in plain pointers; see decode_args.h on what may be in here.
#pragma once

#include "decode_args.h"

namespace mdkv {

// Tokens of one KV head that are read: those that a lease keeps, or a request's full ones.
struct Source {
  int64_t row;  // of the block table
  int64_t first_block;
  int32_t head;
  int32_t full_tokens;  // from the first block on; 0: a lease, whose tokens are in the lists
  int64_t target;       // row of keys and values to which the first token goes
  int64_t pages;        // of all lists, or of the full tokens
  List lists[kMaxFormats];
};

struct ReadArgs {
  DecodeArgs cache;  // without queries
  char* keys;        // [tokens, head_size]
  char* values;      // same
  Element type;      // of both
};

}  // namespace mdkv
