#include "cuda_host.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "args.cuh"

namespace mdkv {
namespace {

constexpr size_t kStackBytes = 64 << 10;

struct Copy {
  uint32_t to;
  const uint8_t* from;
};

struct Warp {
  enum Operation {
    kNone,
    kSync,
    kMatrices,
    kTransposed,
    kTranspose,
    kFloat16,
    kBFloat16,
    kShuffle
  };
  Operation operation = kNone;
  int arrived = 0;
  long finished = 0;  // operations
  uint32_t in[32][10];
  uint32_t out[32][4];
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  std::deque<std::vector<Copy>> groups;  // closed, not arrived
  std::vector<Copy> open;
  bool done = false;
};

struct Block {
  int index = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  int arrived = 0;
  long barriers = 0;
  int current = 0;
  long progress = 0;  // so that a block in which nothing moves is noticed
  ucontext_t scheduler;
  Kernel kernel = nullptr;
  const DecodeArgs* args = nullptr;
};

Block block;
bool reversed_order = false, late_copies = false;
const uint8_t* kv_cache_begin = nullptr;
const uint8_t* kv_cache_end = nullptr;
int32_t* page_owners = nullptr;  // by page of the cache, the block that copies it
std::vector<List> last_lists;    // of the last launch
int device_shared_bytes = 99 << 10;

[[noreturn]] void stop(const char* what) {
  std::fprintf(stderr, "cuda_host: block %d, thread %d: %s\n", block.index, block.current, what);
  std::abort();
}

Thread& thread() { return *block.threads[block.current]; }
Warp& warp() { return block.warps[block.current / 32]; }
int lane() { return block.current % 32; }

void yield() { swapcontext(&thread().context, &block.scheduler); }

uint8_t* shared_at(uint32_t at, uint32_t bytes) {
  if (at % bytes != 0) stop("a misaligned address of shared memory");
  if (at + bytes > block.shared.size()) stop("an address out of shared memory");
  return block.shared.data() + at;
}

// Waits until all threads of the warp have come; the last one runs `compute` for all.
template <typename Compute>
void together(Warp::Operation operation, Compute&& compute) {
  Warp& all = warp();
  if (all.arrived > 0 && all.operation != operation) stop("threads of a warp part ways");
  all.operation = operation;
  ++block.progress;
  if (++all.arrived == 32) {
    compute(all);
    all.arrived = 0;
    ++all.finished;
    return;
  }
  for (const long before = all.finished; all.finished == before;) yield();
}

float float_of_bfloat16(uint32_t bits) { return as_float(bits << 16); }

uint32_t float16_bits_of(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

uint32_t bfloat16_bits_of(float x) {
  const uint32_t bits = as_bits(x);
  if (x != x) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

uint32_t half_of(uint32_t word, int which) { return word >> 16 * which & 0xFFFF; }

void matrices(uint32_t (&m)[4], uint32_t row, bool transposed) {
  warp().in[lane()][0] = row;
  together(transposed ? Warp::kTransposed : Warp::kMatrices, [&](Warp& all) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      for (int r = 0; r < 8; ++r) {
        std::memcpy(elements[r], shared_at(all.in[8 * matrix + r][0], 16), 16);
      }
      for (int l = 0; l < 32; ++l) {
        const int g = l / 4, q = l % 4 * 2;
        const uint32_t low = transposed ? elements[q][g] : elements[g][q];
        const uint32_t high = transposed ? elements[q + 1][g] : elements[g][q + 1];
        all.out[l][matrix] = low | high << 16;
      }
    }
  });
  std::memcpy(m, warp().out[lane()], sizeof m);
}

template <typename ToFloat>
void multiply(Warp::Operation operation, float (&c)[4], const uint32_t (&a)[4],
              const uint32_t (&b)[2], ToFloat&& to_float) {
  uint32_t* in = warp().in[lane()];
  std::memcpy(in, a, sizeof a);
  std::memcpy(in + 4, b, sizeof b);
  std::memcpy(in + 6, c, sizeof c);
  together(operation, [&](Warp& all) {
    float left[16][16], right[16][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, q = l % 4 * 2;
      for (int i = 0; i < 8; ++i) {
        left[g + i / 2 % 2 * 8][q + i % 2 + i / 4 * 8] = to_float(half_of(all.in[l][i / 2], i % 2));
      }
      for (int i = 0; i < 4; ++i) {
        right[q + i % 2 + i / 2 * 8][g] = to_float(half_of(all.in[l][4 + i / 2], i % 2));
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        double sum = as_float(all.in[l][6 + i]);
        for (int k = 0; k < 16; ++k) sum += double{left[row][k]} * right[k][column];
        all.out[l][i] = as_bits(static_cast<float>(sum));
      }
    }
  });
  for (int i = 0; i < 4; ++i) c[i] = as_float(warp().out[lane()][i]);
}

void arrive(const std::vector<Copy>& group) {
  for (const Copy& copy : group) std::memcpy(block.shared.data() + copy.to, copy.from, 16);
}

void run_thread() {
  block.kernel(*block.args);
  thread().done = true;
  ++block.progress;
  yield();
}

void start(Thread& thread) {
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = thread.stack.size();
  thread.context.uc_link = nullptr;
  thread.groups.clear();
  thread.open.clear();
  thread.done = false;
  makecontext(&thread.context, run_thread, 0);
}

void run_block(int threads, int shared_bytes) {
  while (static_cast<int>(block.threads.size()) < threads) {
    block.threads.push_back(std::make_unique<Thread>());
  }
  block.threads.resize(threads);
  block.warps.assign((threads + 31) / 32, Warp());
  block.shared.assign(shared_bytes, 0xFF);
  block.arrived = 0;
  for (auto& thread : block.threads) start(*thread);
  for (int left = threads; left > 0;) {
    const long before = block.progress;
    for (int i = 0; i < threads; ++i) {
      block.current = reversed_order ? threads - 1 - i : i;
      if (thread().done) continue;
      swapcontext(&block.scheduler, &thread().context);
      if (thread().done) --left;
    }
    if (block.progress == before) stop("threads wait for others that will not come");
  }
}

}  // namespace

int thread_index() { return block.current; }
int num_threads() { return static_cast<int>(block.threads.size()); }
int block_index() { return block.index; }

void sync_block() {
  ++block.progress;
  if (++block.arrived == num_threads()) {
    block.arrived = 0;
    ++block.barriers;
    return;
  }
  for (const long before = block.barriers; block.barriers == before;) yield();
}

void sync_warp() {
  together(Warp::kSync, [](Warp&) {});
}

uint32_t load_shared32(uint32_t at) {
  uint32_t word;
  std::memcpy(&word, shared_at(at, 4), 4);
  return word;
}

uint32_t load_shared16(uint32_t at) {
  uint16_t half;
  std::memcpy(&half, shared_at(at, 2), 2);
  return half;
}

void store_shared32(uint32_t at, uint32_t word) { std::memcpy(shared_at(at, 4), &word, 4); }

void copy_async(uint32_t to, const uint8_t* from) {
  shared_at(to, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) stop("a misaligned copy");
  if (kv_cache_begin && (from < kv_cache_begin || from + 16 > kv_cache_end))
    stop("a copy from elsewhere");
  if (page_owners) page_owners[(from - kv_cache_begin) / block.args->page_bytes] = block.index;
  if (late_copies) {
    thread().open.push_back({to, from});
  } else {
    arrive({{to, from}});
  }
}

void commit_copies() {
  thread().groups.push_back(thread().open);
  thread().open.clear();
}

void wait_copies(int pending) {
  while (static_cast<int>(thread().groups.size()) > pending) {
    arrive(thread().groups.front());
    thread().groups.pop_front();
  }
}

void load_matrices(uint32_t (&m)[4], uint32_t row) { matrices(m, row, false); }
void load_matrices_transposed(uint32_t (&m)[4], uint32_t row) { matrices(m, row, true); }

uint32_t transpose_matrix(uint32_t m) {
  warp().in[lane()][0] = m;
  together(Warp::kTranspose, [](Warp& all) {
    for (int l = 0; l < 32; ++l) {
      const int column = l / 4, row = l % 4 * 2;
      const auto element = [&](int r) {
        return half_of(all.in[4 * r + column / 2][0], column % 2);
      };
      all.out[l][0] = element(row) | element(row + 1) << 16;
    }
  });
  return warp().out[lane()][0];
}

void multiply_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply(Warp::kFloat16, c, a, b, float_of_float16);
}

void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply(Warp::kBFloat16, c, a, b, float_of_bfloat16);
}

uint32_t pack_float16x2(float low, float high) {
  return float16_bits_of(low) | float16_bits_of(high) << 16;
}

uint32_t pack_bfloat16x2(float low, float high) {
  return bfloat16_bits_of(low) | bfloat16_bits_of(high) << 16;
}

float float_of_float16(uint32_t bits) {
  const uint16_t low = static_cast<uint16_t>(bits);
  _Float16 half;
  std::memcpy(&half, &low, sizeof half);
  return static_cast<float>(half);
}

uint32_t shuffle(uint32_t x, int from) {
  warp().in[lane()][0] = x;
  warp().in[lane()][1] = static_cast<uint32_t>(from) & 31;
  together(Warp::kShuffle, [](Warp& all) {
    for (int l = 0; l < 32; ++l) all.out[l][0] = all.in[all.in[l][1]][0];
  });
  return warp().out[lane()][0];
}

uint32_t shuffle_xor(uint32_t x, int mask) { return shuffle(x, lane() ^ mask); }

uint32_t ballot(bool vote) {
  uint32_t votes = vote ? 1u << lane() : 0;
  for (int mask = 1; mask < 32; mask *= 2) votes |= shuffle_xor(votes, mask);
  return votes;
}

// Of a launch, by kernel; 48 KiB without a word.
std::map<Kernel, int> allowed_shared;

const char* launch(Kernel kernel, int blocks, int threads, int shared_bytes, void*,
                   const DecodeArgs& args) {
  const auto allowed = allowed_shared.find(kernel);
  if (shared_bytes > (allowed == allowed_shared.end() ? 48 << 10 : allowed->second)) {
    return "more shared memory than the kernel may have";
  }
  block.kernel = kernel;
  block.args = &args;
  last_lists.assign(args.lists, args.lists + args.num_lists);
  for (int i = 0; i < blocks; ++i) {
    // In an order that no kernel may depend on.
    block.index = reversed_order ? blocks - 1 - i : i;
    run_block(threads, shared_bytes);
  }
  return nullptr;
}

const char* shared_limit(int& bytes) {
  bytes = device_shared_bytes;
  return nullptr;
}

const char* allow_shared(Kernel kernel, int bytes) {
  allowed_shared[kernel] = bytes;
  return nullptr;
}

const char* resident_warps(Kernel, int shared_bytes, int& warps) {
  warps = std::min(12, device_shared_bytes / shared_bytes);
  return nullptr;
}

}  // namespace mdkv

#define MDKV_EXPORT extern "C" __attribute__((visibility("default")))

// Shared memory of the machine's only multiprocessor, in bytes; a block may have all of it.
MDKV_EXPORT void mdkv_host_device(int shared_bytes) { mdkv::device_shared_bytes = shared_bytes; }

// How the next calls run: threads and blocks from the last to the first; copies that arrive when
// they are waited for, not at once; where copies may come from.
MDKV_EXPORT void mdkv_host_configure(int reversed, int late, const void* kv_cache, int64_t bytes) {
  mdkv::reversed_order = reversed;
  mdkv::late_copies = late;
  mdkv::kv_cache_begin = static_cast<const uint8_t*>(kv_cache);
  mdkv::kv_cache_end = mdkv::kv_cache_begin + bytes;
}

// Where the next calls write which block copies a page of the cache; null for nowhere.
MDKV_EXPORT void mdkv_host_owners(int32_t* owners) { mdkv::page_owners = owners; }

// Weights of a page of every list, tail included, in the last call.
MDKV_EXPORT void mdkv_host_weights(int32_t* weights) {
  for (const mdkv::List& list : mdkv::last_lists) *weights++ = list.weight;
}
