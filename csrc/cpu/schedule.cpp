#include "schedule.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "units.h"

namespace mdkv {
namespace {

// Below this, starting a task and merging its parts costs more than another thread saves.
constexpr int64_t kMinTaskBytes = 32 * 1024;
// Tasks per thread, so that uneven threads and uneven page formats even out.
constexpr int64_t kTasksPerThread = 4;

struct FreeDeleter {
  void operator()(char* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, FreeDeleter>;

Buffer allocate(int64_t bytes) {
  void* memory = std::aligned_alloc(64, round_up(std::max<int64_t>(bytes, 64), 64));
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<char*>(memory));
}

// A unit that several tasks share.
struct Shared {
  enum State : int { kIdle, kPreparing, kReady };
  std::atomic<int> state{kIdle};
  std::atomic<int64_t> parts_left{0};
  Prepared prepared;
  std::vector<Partial> parts;
};

// A run of pages of one unit.
struct Piece {
  int64_t unit;
  int64_t begin, end;
  int64_t part;    // of the unit
  Shared* shared;  // null where the unit is a single piece
};

// A run of pieces of about the same number of pages as any other task's. Where tasks begin and end,
// and so the rounding of every merge, follows from the call and the number of threads, never from
// which thread was faster.
struct Task {
  int64_t first_piece, last_piece;
  std::atomic<bool> taken{false};
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
    const int64_t num_tasks = tasks_.size();
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), num_tasks);
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      Buffer buffer = allocate(bytes);
      Carver carver(buffer.get());
      ThreadScratch scratch = ThreadScratch::carve(args_, carver);
      for (int64_t thread = begin; thread < end; ++thread) {
        const int64_t first = num_tasks * thread / threads;
        const int64_t last = num_tasks * (thread + 1) / threads;
        for (int64_t i = first; i < last; ++i) {
          run_task(i, i + 1 < last ? tasks_[i + 1].first_piece : -1, scratch);
        }
      }
      // What is left belongs to slower threads, which are furthest from their last task.
      for (int64_t i = num_tasks - 1; i >= 0; --i) run_task(i, -1, scratch);
    });
  }

 private:
  // A unit without pages still has to write its zeros.
  static int64_t weight(const Unit& unit) { return std::max<int64_t>(unit.pages, 1); }

  void split() {
    int64_t total = 0;
    for (const Unit& unit : units_.all) total += weight(unit);
    const int64_t threads = at::get_num_threads();
    const int64_t num_tasks = threads == 1
                                  ? 1
                                  : std::clamp<int64_t>(total * args_.page_bytes / kMinTaskBytes, 1,
                                                        threads * kTasksPerThread);
    tasks_ = std::vector<Task>(num_tasks);
    int64_t unit = 0, done = 0, before = 0;  // pages done of the unit, and before it
    for (int64_t t = 0; t < num_tasks; ++t) {
      const int64_t stop = total * (t + 1) / num_tasks;
      tasks_[t].first_piece = pieces_.size();
      while (before + done < stop) {
        const int64_t left = weight(units_.all[unit]) - done;
        const int64_t taken = std::min(left, stop - before - done);
        const int64_t part = done > 0 ? pieces_.back().part + 1 : 0;
        pieces_.push_back({unit, done, done + taken, part, nullptr});
        done += taken;
        if (taken == left) before += done, done = 0, ++unit;
      }
      tasks_[t].last_piece = pieces_.size();
    }
    share();
  }

  // Gives every unit of several pieces the memory that its pieces share.
  void share() {
    std::vector<int64_t> parts(units_.all.size(), 0);
    for (const Piece& piece : pieces_) ++parts[piece.unit];
    int64_t num_shared = 0, num_parts = 0;
    for (const int64_t count : parts) {
      num_shared += count > 1;
      num_parts += count > 1 ? count : 0;
    }
    shared_ = std::vector<Shared>(num_shared);
    Carver prepared_size(nullptr), partial_size(nullptr);
    Prepared::carve(args_, prepared_size);
    Partial::carve(args_, partial_size);
    shared_buffer_ = allocate(num_shared * prepared_size.used() + num_parts * partial_size.used());
    Carver carver(shared_buffer_.get());
    Shared* next = shared_.data();
    for (Piece& piece : pieces_) {
      const int64_t count = parts[piece.unit];
      if (count == 1) continue;
      if (piece.part == 0) {
        next->prepared = Prepared::carve(args_, carver);
        next->parts_left = count;
        for (int64_t p = 0; p < count; ++p) next->parts.push_back(Partial::carve(args_, carver));
        ++next;
      }
      piece.shared = next - 1;
    }
  }

  // Runs a task unless another thread did. next_piece: what this thread does after it, or -1.
  void run_task(int64_t index, int64_t next_piece, ThreadScratch& scratch) {
    Task& task = tasks_[index];
    if (task.taken.exchange(true, std::memory_order_relaxed)) return;
    for (int64_t p = task.first_piece; p < task.last_piece; ++p) {
      const int64_t next = p + 1 < task.last_piece ? p + 1 : next_piece;
      process(pieces_[p], next < 0 ? PageRun{} : page_run(pieces_[next]), scratch);
    }
  }

  void process(const Piece& piece, const PageRun& next, ThreadScratch& scratch) {
    const Unit& unit = units_.all[piece.unit];
    const PageRun run = page_run(piece);
    if (piece.shared == nullptr) {
      kernels_.prepare(args_, unit, scratch.tile, scratch.prepared);
      kernels_.attend(args_, run, next, scratch.prepared, scratch.tile, scratch.partial);
      kernels_.finish(args_, unit, &scratch.partial, 1, scratch.tile);
      return;
    }
    Shared& shared = *piece.shared;
    prepare_once(unit, shared, scratch);
    kernels_.attend(args_, run, next, shared.prepared, scratch.tile, shared.parts[piece.part]);
    if (shared.parts_left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      kernels_.finish(args_, unit, shared.parts.data(), shared.parts.size(), scratch.tile);
    }
  }

  PageRun page_run(const Piece& piece) const {
    const Unit& unit = units_.all[piece.unit];
    return {&unit, piece.begin, std::min(piece.end, unit.pages)};
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
  Units units_;
  std::vector<Piece> pieces_;
  std::vector<Task> tasks_;
  std::vector<Shared> shared_;
  Buffer shared_buffer_;
};

}  // namespace

void run_decode(const DecodeArgs& args, const Kernels& kernels) {
  if (args.num_queries > 0) Run(args, kernels).execute();
}

}  // namespace mdkv
