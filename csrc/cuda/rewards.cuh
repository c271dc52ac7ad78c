// Scatters segment rewards to the tokens of a row.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
#include "segk/rewards.h"

namespace segk {

// A Credit as an argument of a kernel, with a copy of a curve that is in the host's memory.
struct CreditArg {
  Credit credit;
  float curve[kCurveNumbers];

  CreditArg(const char* op, const Credit& from) : credit(from), curve{} {
    if (from.curve_on_gpu || !from.curve.packed) return;
    const int32_t count = from.curve.n_knots();
    if (count > kMaxKnots) {
      throw std::invalid_argument(std::string(op) + ": normalizer: expected at most " +
                                  std::to_string(kMaxKnots) + " knots, got " +
                                  std::to_string(count) + "; merge neighbouring ones");
    }
    std::copy_n(from.curve.packed, 4 + 3 * count, curve);
  }
};

// Its numbers are read where they are used, and again each time: kept, they would cost registers.
using SharedCurve = PackedCurve<volatile float>;

// The curve in shared memory. All threads of the block call this at the same time.
__device__ inline SharedCurve shared_curve(const CreditArg& arg) {
  __shared__ float copy[kCurveNumbers];
  const float* from = arg.credit.curve_on_gpu ? arg.credit.curve.packed : arg.curve;
  const int count = 4 + 3 * static_cast<int>(from[3]);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    copy[i] = from[i];
  }
  __syncthreads();
  return {copy};
}

struct ScatterArgs {
  Floats rewards;
  const bool* ends;
  const bool* mask;
  Rows rows;
  CreditArg credit;
  float* token_rewards;
  int rows_per_block;
};

// Scatters the segment rewards of one row, tile by tile from the last to the first. A first walk
// over the flags finds how many action tokens of a segment lie to the left of each tile, and keeps
// that number in the tile's first element of token_rewards until the second walk overwrites it.
class RewardScatter {
 public:
  __device__ RewardScatter(Group group, const ScatterArgs& args, SharedCurve curve,
                           const Tiles& tiles)
      : group_(group), args_(args), curve_(curve), tiles_(tiles), single_tile_(tiles.count() == 1) {
    if (single_tile_) return;
    EndsBefore passed = kNone;
    for (int32_t tile = 0; tile < tiles_.count(); ++tile) {
      if (tile > 0 && group_.rank() == 0) {
        args_.token_rewards[tiles_.first(tile)] =
            detail::bits_to_float(static_cast<uint32_t>(passed.since));
      }
      const Items items = tiles_.items(tile);
      const uint32_t action = load_flags(args_.mask, items);
      const EndsBefore mine = ends_in(action, load_flags(args_.ends, items) & action);
      passed = group_.scan<From::left>(mine, passed, kNone).total;
    }
    segments_ = passed.ends;
  }

  // Takes the rewards at the tile's ends and leaves the token rewards of all its tokens.
  __device__ void operator()(int32_t tile, uint32_t action, uint32_t ends,
                             float (&rewards)[kItems]) {
    EndsBefore carried = kNone;
    // Read by the thread that wrote it, so no barrier is needed.
    if (tile > 0 && group_.rank() == 0) {
      const float bits = args_.token_rewards[tiles_.first(tile)];
      memcpy(&carried.since, &bits, sizeof bits);
    }
    const auto passed =
        group_.scan<From::left>(combine(carried, ends_in(action, ends)), kNone, kNone);
    if (single_tile_) segments_ = passed.total.ends;
    EndsBefore before = group_.rank() == 0 ? carried : passed.before;
    before.ends += segments_ - behind_ - passed.total.ends;  // those of the tiles to the left

    // End by end and not token by token: most threads have fewer ends than tokens, and the division
    // and the logarithm of a token reward are the slowest step.
    FirstEnd first{0, false};
    uint32_t counted = 0;
    for (uint32_t ahead = ends; ahead != 0; ahead &= ahead - 1) {
      const int i = __ffs(static_cast<int>(ahead)) - 1;
      const uint32_t up_to = (2u << i) - 1;
      before = combine(before, EndsBefore{0, __popc(action & up_to & ~counted)});
      const float token_reward = args_.credit.credit.token_reward(
          curve_, get(rewards, i), before.ends, segments_, before.since);
      set(rewards, i, token_reward);
      first = combine(first, FirstEnd{token_reward, true});
      before = combine(before, EndsBefore{1, 0});
      counted = up_to;
    }
    const auto next = group_.scan<From::right>(first, next_, FirstEnd{0, false});
    float token_reward = next.before.token_reward;
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      if (has(ends, i)) token_reward = rewards[i];
      const bool credited = has(args_.credit.credit.spread == Spread::last ? ends : action, i);
      rewards[i] = credited ? token_reward : 0.0f;
    }
    behind_ += passed.total.ends;
    next_ = next.total;
  }

 private:
  static constexpr EndsBefore kNone{0, 0};

  __device__ static EndsBefore ends_in(uint32_t action, uint32_t ends) {
    // No end leaves a mask of ones: __clz(0) is 32.
    const uint32_t behind_last = ~((1ull << (32 - __clz(ends))) - 1) & kAllItems;
    return {__popc(ends), __popc(action & behind_last)};
  }

  Group group_;
  const ScatterArgs& args_;
  SharedCurve curve_;
  const Tiles& tiles_;
  bool single_tile_;
  int32_t segments_ = 0;
  int32_t behind_ = 0;       // ends in the tiles to the right
  FirstEnd next_{0, false};  // the first of them
};

}  // namespace segk
