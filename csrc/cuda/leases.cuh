// Where the pages of a unit's lists lie, lease by lease.
#pragma once

#include "args.cuh"

namespace mdkv {

MDKV_DEVICE int warp_scan(int x, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = static_cast<int>(shuffle(static_cast<uint32_t>(x), (lane - step) & 31));
    if (lane >= step) x += other;
  }
  return x;
}

// What a warp found of a row's leases.
struct Leases {
  int count;
  int end_block;  // behind the last one; 0 for none
  int pages;      // of the list, in all of them
};

// Looks through a row's `most` leases, 32 at a time, and writes the extents of a list if there is
// one.
MDKV_DEVICE Leases read_leases(const DecodeArgs& args, const int32_t* leases, int most,
                               const int32_t* blocks, const List* list, int64_t entry,
                               Extent* extents, int lane) {
  Leases found = {0, 0, 0};
#pragma unroll 1
  for (int first = 0; first < most; first += 32) {
    const int lease = first + lane;
    const bool exists = lease < most;
    const int first_block = exists ? leases[2 * lease] : 0;
    const int end_block = exists ? leases[2 * lease + 1] : 0;
    const uint32_t held = ballot(end_block > 0);
    int tokens = 0, first_page = 0;
    if (list != nullptr && end_block > 0) {
      // A page table never spans blocks, and the pages of a block are contiguous.
      const uint8_t* table = lease_page(args, blocks, first_block, 0);
      tokens = reinterpret_cast<const int32_t*>(table)[2 * entry];
      first_page = reinterpret_cast<const int32_t*>(table)[2 * entry + 1];
    }
    if (list != nullptr) {
      const int own = pages_of(*list, tokens);
      const int until = found.pages + warp_scan(own, lane), before = until - own;
      if (end_block > 0) {
        extents[lease] = {until, before * list->tokens_per_page + tokens, first_page - before,
                          first_block};
      }
      found.pages = static_cast<int>(shuffle(static_cast<uint32_t>(until), 31));
    }
    const int count = held == 0xFFFFFFFFu ? 32 : first_bit(~held);
    if (count > 0) {
      found.end_block = static_cast<int>(shuffle(static_cast<uint32_t>(end_block), count - 1));
    }
    found.count += count;
    if (count < 32) break;
  }
  return found;
}

// The extent of a list in which a page of it lies, of `leases`.
MDKV_DEVICE Extent extent_of(const DecodeArgs& args, const Extent* extents, int leases, int page) {
  int lease = 0;
  for (int step = args.lease_step; step > 0; step /= 2) {
    if (lease + step < leases && extents[lease + step - 1].end <= page) lease += step;
  }
  return extents[lease];
}

}  // namespace mdkv
