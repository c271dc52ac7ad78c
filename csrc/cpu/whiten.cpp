// Moments are taken over blocks of a fixed size, so results do not depend on the number of threads.
#include "segk/whiten.h"

#include <algorithm>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/flags.h"
#include "cpu/parallel.h"
#include "segk/storage.h"

namespace segk {
namespace {

constexpr int64_t kMomentsBlock = 4096;

template <class X>
Moments moments_of_block(X x, Flags mask, int64_t begin, int64_t end) {
  const auto count = static_cast<double>(count_true(begin, end, mask));
  if (count == 0) return {0, 0, 0};
  const double mean = sum_true(begin, end, [&](int64_t t) { return x[t]; }, mask) / count;
  const auto square = [&](int64_t t) { return (x[t] - mean) * (x[t] - mean); };
  return {count, mean, sum_true(begin, end, square, mask)};
}

}  // namespace

void moments_fwd(Floats x, const bool* mask, int64_t n, double* moments, void*, Executor executor) {
  const int64_t blocks = (n + kMomentsBlock - 1) / kMomentsBlock;
  std::vector<Moments> parts(static_cast<size_t>(blocks));
  with_storage(
      [&](auto values) {
        const auto range = [&](int64_t first, int64_t last) {
          for (int64_t block = first; block < last; ++block) {
            const int64_t begin = block * kMomentsBlock;
            const int64_t end = std::min(begin + kMomentsBlock, n);
            parts[block] = moments_of_block(values, flags_of(mask), begin, end);
          }
        };
        parallel_for(blocks, kQuickTokensPerTask / kMomentsBlock, executor.threads_or_stream,
                     std::cref(range));
      },
      x);
  for (int64_t step = 1; step < blocks; step *= 2) {
    for (int64_t i = 0; i + step < blocks; i += 2 * step) {
      parts[i] = combine(parts[i], parts[i + step]);
    }
  }
  const Moments all = blocks ? parts[0] : Moments{0, 0, 0};
  moments[0] = all.count;
  moments[1] = all.mean;
  moments[2] = all.m2;
}

void whiten_fwd(Floats x, const bool* mask, int64_t n, const double* moments, bool center,
                float* out, Executor executor) {
  const Whitening whitened({moments[0], moments[1], moments[2]}, center);
  const Flags actions = flags_of(mask);
  with_storage(
      [&](auto values) {
        const auto range = [&](int64_t first, int64_t last) {
          for (int64_t t = first; t < last; ++t) out[t] = keep(actions[t], whitened(values[t]));
        };
        parallel_for(n, kQuickTokensPerTask, executor.threads_or_stream, std::cref(range));
      },
      x);
}

}  // namespace segk
