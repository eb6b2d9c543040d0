#include "schedule.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "units.h"

namespace mdkv {
namespace {

// Below this, starting a part and merging it costs more than another thread saves.
constexpr int64_t kMinPartBytes = 32 * 1024;
// Parts per thread, so that uneven threads and uneven requests even out.
constexpr int64_t kPartsPerThread = 4;

struct FreeDeleter {
  void operator()(char* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, FreeDeleter>;

Buffer allocate(int64_t bytes) {
  return Buffer(
      static_cast<char*>(std::aligned_alloc(64, round_up(std::max<int64_t>(bytes, 64), 64))));
}

// A unit that several threads share.
struct Shared {
  enum State : int { kIdle, kPreparing, kReady };
  std::atomic<int> state{kIdle};
  std::atomic<int64_t> parts_left{0};
  Prepared prepared;
  std::vector<Partial> parts;
};

struct Task {
  int64_t unit;
  int64_t part;
  int64_t parts;
  Shared* shared;  // null where the unit is a single task
};

struct ThreadScratch {
  TileScratch tile;
  Prepared prepared;
  Partial partial;

  static ThreadScratch carve(const DecodeArgs& args, Carver& carver) {
    return {TileScratch::carve(args, carver), Prepared::carve(args, carver),
            Partial::carve(args, carver)};
  }
};

class Run {
 public:
  Run(const DecodeArgs& args, const Kernels& kernels)
      : args_(args), kernels_(kernels), units_(read_units(args)) {
    split();
  }

  void execute() {
    Carver count(nullptr);
    ThreadScratch::carve(args_, count);
    const int64_t bytes = count.used();
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks_.size());
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      Buffer buffer = allocate(bytes);
      Carver carver(buffer.get());
      ThreadScratch scratch = ThreadScratch::carve(args_, carver);
      const int64_t num_tasks = static_cast<int64_t>(tasks_.size());
      for (int64_t i = next_.fetch_add(1); i < num_tasks; i = next_.fetch_add(1)) {
        process(tasks_[i], scratch);
      }
    });
  }

 private:
  void split() {
    int64_t pages = 0;
    for (const Unit& unit : units_) pages += unit.pages;
    const int64_t threads = at::get_num_threads();
    const int64_t part_pages =
        threads == 1 ? std::max<int64_t>(pages, 1)
                     : std::max((kMinPartBytes + args_.page_bytes - 1) / args_.page_bytes,
                                pages / (threads * kPartsPerThread) + 1);
    int64_t num_shared = 0, num_parts = 0;
    for (const Unit& unit : units_) {
      const int64_t parts = parts_of(unit, part_pages);
      num_shared += parts > 1;
      num_parts += parts > 1 ? parts : 0;
    }
    shared_ = std::vector<Shared>(num_shared);
    Carver prepared_size(nullptr), partial_size(nullptr);
    Prepared::carve(args_, prepared_size);
    Partial::carve(args_, partial_size);
    shared_buffer_ = allocate(num_shared * prepared_size.used() + num_parts * partial_size.used());
    Carver carver(shared_buffer_.get());
    Shared* next = shared_.data();
    for (int64_t u = 0; u < static_cast<int64_t>(units_.size()); ++u) {
      const int64_t parts = parts_of(units_[u], part_pages);
      Shared* shared = parts > 1 ? next++ : nullptr;
      if (shared != nullptr) {
        shared->prepared = Prepared::carve(args_, carver);
        shared->parts_left = parts;
        for (int64_t p = 0; p < parts; ++p) shared->parts.push_back(Partial::carve(args_, carver));
      }
      for (int64_t p = 0; p < parts; ++p) tasks_.push_back({u, p, parts, shared});
    }
  }

  static int64_t parts_of(const Unit& unit, int64_t part_pages) {
    return std::max<int64_t>(1, (unit.pages + part_pages - 1) / part_pages);
  }

  void process(const Task& task, ThreadScratch& scratch) {
    const Unit& unit = units_[task.unit];
    if (task.shared == nullptr) {
      kernels_.prepare(args_, unit, scratch.tile, scratch.prepared);
      kernels_.attend(args_, unit, scratch.prepared, 0, unit.pages, scratch.tile, scratch.partial);
      kernels_.finish(args_, unit, &scratch.partial, 1, scratch.tile);
      return;
    }
    Shared& shared = *task.shared;
    prepare_once(unit, shared, scratch);
    kernels_.attend(args_, unit, shared.prepared, unit.pages * task.part / task.parts,
                    unit.pages * (task.part + 1) / task.parts, scratch.tile,
                    shared.parts[task.part]);
    if (shared.parts_left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      kernels_.finish(args_, unit, shared.parts.data(), task.parts, scratch.tile);
    }
  }

  void prepare_once(const Unit& unit, Shared& shared, ThreadScratch& scratch) {
    int expected = Shared::kIdle;
    if (shared.state.compare_exchange_strong(expected, Shared::kPreparing)) {
      kernels_.prepare(args_, unit, scratch.tile, shared.prepared);
      shared.state.store(Shared::kReady, std::memory_order_release);
      return;
    }
    while (shared.state.load(std::memory_order_acquire) != Shared::kReady) {
      std::this_thread::yield();
    }
  }

  const DecodeArgs& args_;
  const Kernels& kernels_;
  std::vector<Unit> units_;
  std::vector<Task> tasks_;
  std::vector<Shared> shared_;
  Buffer shared_buffer_;
  std::atomic<int64_t> next_{0};
};

}  // namespace

void run_decode(const DecodeArgs& args, const Kernels& kernels) {
  if (args.num_queries > 0) Run(args, kernels).execute();
}

}  // namespace mdkv
