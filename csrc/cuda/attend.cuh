// The second kernel: every warp attends over its share of the batch's pages.
//
// A block is one warp, and all are resident at once. Each has a ring of stages in shared memory,
// one page each, and shares nothing with any other, so nothing waits but for memory.
#pragma once

#include "codes.cuh"
#include "elements.cuh"
#include "source.cuh"

namespace mdkv {

template <int D>
class Consumer {
 public:
  MDKV_DEVICE Consumer(const DecodeArgs& args, const SharedPlaces& places, int warp, int lane)
      : args_(args), places_(places), warp_(warp), lane_(lane) {}

  // Attends over the page in a stage.
  MDKV_DEVICE void attend(int stage) {
    const uint32_t ticket = places_.tickets + stage * kTicketWords * 4;
    const int unit = static_cast<int>(load_shared32(ticket + 4 * kUnit));
    // From one thread, so that the compiler knows that all of them take the same branches.
    const int index = static_cast<int>(shuffle(load_shared32(ticket + 4 * kList), 0));
    const List& list = args_.lists[index];
    if (unit != unit_ || index != list_) {
      if (unit != unit_ || list.run != run_) {
        finish();
        reset(state_);
      }
      unit_ = unit;
      list_ = index;
      run_ = list.run;
      load_query(list);
    }
    const Page page = {places_.stages + stage * args_.stage_bytes, places_.zeros,
                       static_cast<int>(load_shared32(ticket + 4 * kTokens)), args_.scale, lane_};
    if (list.kind == MDKV_SLOTS) {
      attend_elements_of_type<kSlotRows>(page, list);
    } else if (list.kind == MDKV_ELEMENTS && list.aligned) {
      attend_elements_of_type<kWholeRows>(page, list);
    } else if (list.kind == MDKV_ELEMENTS) {
      attend_elements_of_type<kAnyRows>(page, list);
    } else if (list.bits == 8) {
      attend_codes<D, 8>(state_, query_, page, list);
    } else if (list.bits == 4) {
      attend_codes<D, 4>(state_, query_, page, list);
    } else {
      attend_codes<D, 2>(state_, query_, page, list);
    }
  }

  // Writes what the pages since the last change of unit or run have made.
  MDKV_DEVICE void finish() {
    if (unit_ >= 0) store_part(args_, state_, unit_, run_, warp_, lane_);
  }

 private:
  // The type is looked at here, not compiled for: readers of codes have none.
  template <Rows kRows>
  MDKV_DEVICE void attend_elements_of_type(const Page& page, const List& list) {
    if (args_.element == MDKV_BFLOAT16) {
      attend_elements<D, true, kRows>(state_, query_, page, list);
    } else {
      attend_elements<D, false, kRows>(state_, query_, page, list);
    }
  }

  MDKV_DEVICE void load_query(const List& list) {
    const bool codes = list.kind == MDKV_CODES;
    const int head = lane_ / 4;
    const uint16_t* from = args_.queries + (int64_t{unit_} * kHeads + head) * args_.query_width +
                           query_offset(args_, list.rotation, codes);
    const bool exists = head < place_of(args_, unit_).heads;
    if (codes) {
      load_code_query(query_, from, list.rank, exists, lane_);
    } else {
      load_element_query(query_, from, list.rank, exists, lane_);
    }
  }

  const DecodeArgs& args_;
  const SharedPlaces& places_;
  int warp_, lane_;
  int unit_ = -1, list_ = -1, run_ = -1;
  Query<D> query_;
  State<D> state_;
};

// Warps that share a multiprocessor's registers.
template <int D>
constexpr int kWarpsPerMultiprocessor = D > 128 ? 8 : 12;

// Grid: args.warps.
template <int D>
__global__ void __launch_bounds__(32, kWarpsPerMultiprocessor<D>)
    attend_share(const __grid_constant__ DecodeArgs args) {
  const int warp = block_index(), lane = thread_index();
  const SharedPlaces places = shared_places(args);
  if (lane < kChunk / 4) store_shared32(places.zeros + 4 * lane, 0);
  const Share share = find_share(args, warp, lane);
  PageSource source(args, places, share, lane);
  Consumer<D> consumer(args, places, warp, lane);
  const int ahead = args.stages - 1;
  int pages = 0;             // so far
  int filled = 0, read = 0;  // stages
  for (int n = 0; n < pages + ahead; ++n) {
    if (source.has_page()) {
      source.start_copy(filled);
      ++pages;
    }
    commit_copies();
    filled = filled + 1 < args.stages ? filled + 1 : 0;
    if (n < ahead) continue;
    wait_copies(ahead);
    sync_warp();  // what the other threads copied has arrived too
    consumer.attend(read);
    sync_warp();  // nobody reads the stage any more
    read = read + 1 < args.stages ? read + 1 : 0;
  }
  consumer.finish();
}

}  // namespace mdkv
