// The C interface: checks shapes, lays out the workspace, and launches three kernels.
#include <string>

#include "kernels.cuh"
#include "merge.cuh"
#include "prepare.cuh"
#include "source.cuh"
#include "tables.cuh"

namespace mdkv {
namespace {

constexpr int kMinStages = 2, kMaxStages = 4;

thread_local std::string last_error;

int fail(const std::string& why) {
  last_error = why;
  return 1;
}

int shared_bytes(int stages, const DecodeArgs& args) {
  return stages * (args.stage_bytes + kTicketWords * 4) + kChunk;
}

DecodeArgs args_of(const mdkv_shape& shape, const mdkv_plan& plan, int queries) {
  DecodeArgs args = make_args(shape);
  args.warps = plan.warps;
  args.stages = plan.stages;
  args.units = queries * args.num_kv_heads * args.tiles;
  return args;
}

std::string check_plan(const DecodeArgs& args, const mdkv_plan& plan) {
  if (plan.warps < 1 || plan.stages < kMinStages || plan.stages > kMaxStages ||
      plan.shared_bytes != shared_bytes(plan.stages, args)) {
    return "the plan is not one of mdkv_cuda_make_plan for this shape";
  }
  return "";
}

std::string check_call(const mdkv_shape& shape, const mdkv_call& call) {
  if (call.layer < 0 || call.layer >= shape.num_layers) {
    return "layer " + std::to_string(call.layer) + " of " + std::to_string(shape.num_layers);
  }
  if (call.query_element < MDKV_FLOAT32 || call.query_element > MDKV_BFLOAT16) {
    return "queries must be float32, float16 or bfloat16";
  }
  if (reinterpret_cast<uintptr_t>(call.kv_cache) % kChunk != 0 ||
      reinterpret_cast<uintptr_t>(call.workspace) % kChunk != 0) {
    return "kv_cache and workspace must be 16-byte aligned";
  }
  return "";
}

// More threads per query head where there are few: each then has many parts.
int merge_slices(const DecodeArgs& args) {
  const int parts = args.warps / args.units;
  int slices = 1;
  while (slices < parts && 2 * slices * args.head_size <= kMaxMergeThreads) slices *= 2;
  return slices;
}

}  // namespace
}  // namespace mdkv

using namespace mdkv;

#define MDKV_EXPORT extern "C" __attribute__((visibility("default")))

MDKV_EXPORT const char* mdkv_cuda_error(void) { return last_error.c_str(); }

MDKV_EXPORT int mdkv_cuda_abi(void) { return MDKV_CUDA_ABI; }

MDKV_EXPORT int mdkv_cuda_make_plan(const mdkv_shape* shape, mdkv_plan* plan) {
  const std::string refused = check_shape(*shape);
  if (!refused.empty()) return fail(refused);
  const DecodeArgs args = make_args(*shape);
  const Kernel kernel = attend_kernel(shape->head_size);
  int limit = 0;
  if (const char* why = shared_limit(limit)) return fail(why);
  if (const char* why = allow_shared(kernel, limit)) return fail(why);
  // As many warps as fit; among equals, the deepest ring.
  plan->warps = 0;
  for (int stages = kMaxStages; stages >= kMinStages; --stages) {
    const int bytes = shared_bytes(stages, args);
    if (bytes > limit) continue;
    int warps = 0;
    if (const char* why = resident_warps(kernel, bytes, warps)) return fail(why);
    if (warps > plan->warps) *plan = {warps, stages, bytes};
  }
  if (plan->warps == 0) {
    return fail("pages of " + std::to_string(args.page_bytes) + " bytes do not fit " +
                std::to_string(limit) + " bytes of shared memory twice; use a smaller block size");
  }
  return 0;
}

MDKV_EXPORT int mdkv_cuda_workspace_bytes(const mdkv_shape* shape, const mdkv_plan* plan,
                                          int32_t max_queries, size_t* bytes) {
  const std::string refused = check_shape(*shape);
  if (!refused.empty()) return fail(refused);
  DecodeArgs args = args_of(*shape, *plan, max_queries);
  *bytes = place_workspace(args, nullptr);
  return 0;
}

MDKV_EXPORT int mdkv_cuda_mixed_decode(const mdkv_shape* shape, const mdkv_plan* plan,
                                       const mdkv_call* call, void* stream) {
  for (const std::string& refused : {check_shape(*shape), check_call(*shape, *call)}) {
    if (!refused.empty()) return fail(refused);
  }
  if (call->queries == 0) return 0;
  DecodeArgs args = args_of(*shape, *plan, call->queries);
  const std::string refused = check_plan(args, *plan);
  if (!refused.empty()) return fail(refused);
  args.call = *call;
  args.scale = call->scale * 1.4426950408889634f;
  place_workspace(args, static_cast<uint8_t*>(call->workspace));

  const int prepare_shared = kPrepareThreads / 32 * args.head_size * 4 + args.num_lists * 4;
  if (const char* why =
          launch(prepare_units, args.units, kPrepareThreads, prepare_shared, stream, args)) {
    return fail(why);
  }
  const Kernel attend = attend_kernel(shape->head_size);
  if (const char* why = launch(attend, args.warps, 32, plan->shared_bytes, stream, args)) {
    return fail(why);
  }
  const int slices = merge_slices(args);
  const int merge_shared = (3 * slices * args.head_size + slices) * 4;
  if (const char* why = launch(merge_parts, args.units * args.rows, slices * args.head_size,
                               merge_shared, stream, args)) {
    return fail(why);
  }
  return 0;
}
