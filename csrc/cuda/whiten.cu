#include <cooperative_groups.h>

#include "cuda/launch.cuh"
#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
#include "segk/whiten.h"

namespace segk {
namespace {

struct MomentsArgs {
  Floats x;
  const bool* mask;
  int64_t n;
  Moments* parts;
  int64_t n_parts;
  double* moments;
};

__global__ void __launch_bounds__(kMaxThreads, 2) moments_kernel(const MomentsArgs a) {
  static_assert(sizeof(Moments) <= kBytesPerPart, "fits the scratch memory");
  const auto all_blocks = cooperative_groups::this_grid();
  const Group block(true);
  const Moments identity{0, 0, 0};
  for (int64_t part = blockIdx.x; part < a.n_parts; part += gridDim.x) {
    Moments mine = identity;
    for (int64_t start = part * block.size(); start * kItems < a.n;
         start += a.n_parts * block.size()) {
      const Items items = items_at((start + block.rank()) * kItems, a.n);
      const uint32_t action = load_flags(a.mask, items);
      if (action == 0) continue;
      float x[kItems];
      load(a.x, items, action, x);
      const double count = __popc(action);
      double sum = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) sum += has(action, i) ? x[i] : 0.0f;
      const double mean = sum / count;
      double m2 = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const double deviation = has(action, i) ? x[i] - mean : 0.0;
        m2 += deviation * deviation;
      }
      mine = combine(mine, Moments{count, mean, m2});
    }
    const Moments sum = block.scan<From::left>(mine, identity, identity).total;
    if (block.rank() == 0) a.parts[part] = sum;
  }
  all_blocks.sync();

  if (blockIdx.x != 0) return;
  const Moments all = sum_of_parts(a.parts, a.n_parts, identity);
  if (block.rank() == 0) {
    a.moments[0] = all.count;
    a.moments[1] = all.mean;
    a.moments[2] = all.m2;
  }
}

struct WhitenArgs {
  Floats x;
  const bool* mask;
  int64_t n;
  const double* moments;
  bool center;
  float* out;
};

__global__ void __launch_bounds__(kMaxThreads, 2) whiten_kernel(const WhitenArgs a) {
  const Whitening whitened({a.moments[0], a.moments[1], a.moments[2]}, a.center);
  const Items items = items_at((int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kItems, a.n);
  const uint32_t action = load_flags(a.mask, items);
  float x[kItems];
  load(a.x, items, action, x);
#pragma unroll
  for (int i = 0; i < kItems; ++i) x[i] = has(action, i) ? whitened(x[i]) : 0.0f;
  store(x, a.out, items);
}

}  // namespace

void moments_fwd(Floats x, const bool* mask, int64_t n, double* moments, void* scratch,
                 Executor executor) {
  constexpr int kThreads = 256;
  const int64_t parts = std::min(ceil_div(n, int64_t{kThreads} * kItems), kParts);
  const MomentsArgs args{x, mask, n, static_cast<Moments*>(scratch), parts, moments};
  launch_cooperative("moments", moments_kernel, args, parts, kThreads, executor);
}

void whiten_fwd(Floats x, const bool* mask, int64_t n, const double* moments, bool center,
                float* out, Executor executor) {
  constexpr int kThreads = 256;
  const WhitenArgs args{x, mask, n, moments, center, out};
  launch("whiten", whiten_kernel, args, ceil_div(n, int64_t{kThreads} * kItems), kThreads, out,
         executor);
}

}  // namespace segk
