// A warp's share of a batch's pages: finds them one after the other and starts their copies.
#pragma once

#include "leases.cuh"
#include "pages.cuh"

namespace mdkv {

// What is in a stage: words of shared memory behind the stages.
enum Ticket : int32_t { kUnit = 0, kList = 1, kTokens = 2, kTicketWords = 4 };

// A warp's shared memory: stages, 16 bytes of zeros, a ticket per stage.
struct SharedPlaces {
  uint32_t stages, zeros, tickets;
};

MDKV_DEVICE SharedPlaces shared_places(const DecodeArgs& args) {
  const uint32_t zeros = shared_begin() + args.stages * args.stage_bytes;
  return {shared_begin(), zeros, zeros + kChunk};
}

// Pages of the batch lie one after the other in the order of units, lists and pages, each as long
// as its weight. A share is those that begin in [begin, end). Every share is as long as the others,
// and at least as long as a page, so a run's pages are in shares one after the other.
struct Share {
  int begin, end;
  int unit;     // in which the share begins
  int in_unit;  // weight of it before the share
};

MDKV_DEVICE Share find_share(const DecodeArgs& args, int warp, int lane) {
  const int per_lane = (args.units + 31) / 32;
  const int first = lane * per_lane;
  int mine = 0;
  for (int i = 0; i < per_lane; ++i) {
    if (first + i < args.units) mine += args.unit_weight[first + i];
  }
  const int until = warp_scan(mine, lane);
  const int total = static_cast<int>(shuffle(static_cast<uint32_t>(until), 31));
  int share = (total + args.warps - 1) / args.warps;
  share = share > args.min_share ? share : args.min_share;
  if (warp == 0 && lane == 0) *args.share = share;
  Share found;
  found.begin = warp * share < total ? warp * share : total;
  found.end = found.begin + share < total ? found.begin + share : total;
  found.unit = found.in_unit = 0;
  if (found.begin == found.end) return found;
  // The units of one lane, and among them 32 at a time.
  int holder = first_bit(ballot(found.begin < until));
  int before = static_cast<int>(shuffle(static_cast<uint32_t>(until - mine), holder));
  for (int unit = holder * per_lane;; unit += 32) {
    const int weight = unit + lane < args.units ? args.unit_weight[unit + lane] : 0;
    const int so_far = before + warp_scan(weight, lane);
    const uint32_t behind = ballot(found.begin < so_far);
    if (behind != 0) {
      holder = first_bit(behind);
      found.unit = unit + holder;
      found.in_unit =
          found.begin - static_cast<int>(shuffle(static_cast<uint32_t>(so_far - weight), holder));
      return found;
    }
    before = static_cast<int>(shuffle(static_cast<uint32_t>(so_far), 31));
  }
}

class PageSource {
 public:
  MDKV_DEVICE PageSource(const DecodeArgs& args, const SharedPlaces& places, const Share& share,
                         int lane)
      : args_(args),
        places_(places),
        lane_(lane),
        next_(share.begin),
        end_(share.end),
        unit_(share.unit) {
    if (next_ < end_) seek(share.in_unit);
  }

  MDKV_DEVICE bool has_page() const { return next_ < end_; }

  // Starts the copy of the next page into a stage, and writes its ticket.
  MDKV_DEVICE void start_copy(int stage) {
    while (page_ >= list_pages_) next_list();
    if (page_ == looked_up_) look_up();
    const List& list = args_.lists[list_];
    const uint8_t* from = address_of(page_ & 31);
    const int tokens = static_cast<int>(shuffle(static_cast<uint32_t>(tokens_), page_ & 31));
    const uint32_t to = places_.stages + stage * args_.stage_bytes;
    const int chunks = list.kind == MDKV_SLOTS ? tokens * (list.key_row / kChunk) : list.chunks;
    const int keys = chunks < list.first_value_chunk ? chunks : list.first_value_chunk;
    copy_section(to, from, keys, list.key_swizzle);
    if (chunks > keys) {
      const int values = list.last_value_chunk - keys;
      copy_section(to + list.values_at, from + keys * kChunk, values, list.value_swizzle);
      copy_section(to + list.scales_at, from + list.last_value_chunk * kChunk,
                   chunks - list.last_value_chunk, kNoSwizzle);
    }
    if (lane_ == 0) {
      const uint32_t ticket = places_.tickets + stage * kTicketWords * 4;
      store_shared32(ticket + 4 * kUnit, static_cast<uint32_t>(unit_));
      store_shared32(ticket + 4 * kList, static_cast<uint32_t>(list_));
      store_shared32(ticket + 4 * kTokens, static_cast<uint32_t>(tokens));
    }
    ++page_;
    next_ += list.weight;
  }

 private:
  // Starts the copy of chunks that lie one after the other, each swizzled to its place.
  MDKV_DEVICE void copy_section(uint32_t to, const uint8_t* from, int chunks, int swizzle) const {
    if (swizzle == kNoSwizzle) {
      copy_chunks<false>(to, from, chunks, swizzle);
    } else {
      copy_chunks<true>(to, from, chunks, swizzle);
    }
  }

  // All threads go around equally often: a warp runs the remainder of one thread for all.
  template <bool kSwizzled>
  MDKV_DEVICE void copy_chunks(uint32_t to, const uint8_t* from, int chunks, int swizzle) const {
    constexpr int kAround = 4 * 32;  // chunks at a time
    int n = lane_, left = chunks - lane_;
    uint32_t straight = to + n * kChunk;
    from += n * kChunk;
#pragma unroll 1
    for (int around = 0; around < chunks; around += kAround) {
#pragma unroll
      for (int further = 0; further < kAround; further += 32) {
        const uint32_t place =
            kSwizzled ? to + swizzled(n + further, swizzle) * kChunk : straight + further * kChunk;
        if (further < left) copy_async(place, from + further * kChunk);
      }
      n += kAround;
      left -= kAround;
      straight += kAround * kChunk;
      from += kAround * kChunk;
    }
  }

  // Finds the first page that begins at a weight of the unit or behind it.
  MDKV_DEVICE void seek(int weight) {
    if (weight == 0) begin_unit();
    list_ = 0;
    open_list();
    while (weight >= list_pages_ * args_.lists[list_].weight) {
      weight -= list_pages_ * args_.lists[list_].weight;
      ++list_;
      open_list();
    }
    const int of_page = args_.lists[list_].weight;
    page_ = looked_up_ = (weight + of_page - 1) / of_page;
    next_ += page_ * of_page - weight;
  }

  // The merge finds a unit's parts by its first page.
  MDKV_DEVICE void begin_unit() {
    if (lane_ == 0) args_.unit_begin[unit_] = next_;
  }

  MDKV_DEVICE void open_list() {
    list_pages_ = record()[kFirstList + list_];
    page_ = looked_up_ = 0;
  }

  // Leaves a list, or a unit with its last.
  MDKV_DEVICE void next_list() {
    if (++list_ == args_.num_lists) {
      do {
        ++unit_;
      } while (args_.unit_weight[unit_] == 0);
      begin_unit();
      list_ = 0;
    }
    open_list();
  }

  MDKV_DEVICE const int32_t* record() const {
    return args_.records + int64_t{unit_} * args_.record_words;
  }

  // Every thread finds the address and the tokens of one of the next pages, up to a multiple of 32.
  // What is needed here alone is read again each time: registers are scarcer.
  MDKV_DEVICE void look_up() {
    const int32_t* blocks = blocks_of(args_, record()[kRow]);
    const int page = (page_ & ~31) + lane_;
    const int in_list = page < list_pages_ ? page : list_pages_ - 1;
    int until;
    if (list_ + 1 < args_.num_lists) {
      const Extent extent =
          extent_of(args_, extents_of(args_, unit_, list_), record()[kLeases], in_list);
      address_ = lease_page(args_, blocks, extent.first_block, extent.origin + in_list);
      until = extent.until;
    } else {
      const int64_t block = blocks[record()[kTailBlock] + in_list];
      const int unit_head = unit_ / args_.tiles % args_.num_kv_heads;
      const int64_t page_in_block = int64_t{args_.call.layer} * args_.num_kv_heads + unit_head;
      address_ = static_cast<const uint8_t*>(args_.call.kv_cache) +
                 (block * args_.pages_per_block + page_in_block) * args_.page_bytes;
      until = record()[kTailTokens];
    }
    const int of_page = args_.lists[list_].tokens_per_page, left = until - in_list * of_page;
    tokens_ = left < of_page ? left : of_page;
    looked_up_ = (page_ & ~31) + 32;
  }

  MDKV_DEVICE const uint8_t* address_of(int lane) const {
    const uint64_t address = reinterpret_cast<uint64_t>(address_);
    const uint64_t low = shuffle(static_cast<uint32_t>(address), lane);
    const uint64_t high = shuffle(static_cast<uint32_t>(address >> 32), lane);
    return reinterpret_cast<const uint8_t*>(high << 32 | low);
  }

  const DecodeArgs& args_;
  const SharedPlaces& places_;
  int lane_;
  int next_, end_;  // where the next page begins, and where the share ends
  int unit_, list_;
  int page_;       // the next one in its list
  int looked_up_;  // pages of the list before this one have addresses
  int list_pages_;
  const uint8_t* address_;  // of page 32 n + lane
  int tokens_;              // that it holds
};

}  // namespace mdkv
