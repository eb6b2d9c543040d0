// The kernels of one instruction set: each kernels_<isa>.cpp includes its vectors, then this.
#include "attend.h"
#include "finish.h"
#include "kernels.h"
#include "loss_sums.h"
#include "pack.h"
#include "prepare.h"
#include "read_back.h"
#include "read_pages.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

void attend(const DecodeArgs& args, const PageRun& run, const PageRun& next,
            const Prepared& prepared, TileScratch& scratch, Partial& partial) {
  for (int g = 0; g < args.group; ++g) {
    partial.max[g] = kMinusInfinity;
    partial.sum[g] = 0.0f;
  }
  for (int space = 0; space < 3; ++space) {
    clear(partial.out[space], args.group * partial.width[space]);
  }
  if (args.cache_type == Element::kFloat32) {
    Attention<float>(args, prepared, scratch, partial).run(run, next);
  } else if (args.cache_type == Element::kBFloat16) {
    Attention<BFloat16>(args, prepared, scratch, partial).run(run, next);
  } else {
    Attention<Half>(args, prepared, scratch, partial).run(run, next);
  }
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv
