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

// Scatters the segment rewards of one row, tile by tile from the last to the first. A first walk
// over the flags finds how many segments the row has, and how many action tokens of a segment lie
// to the left of each tile: kept in the tile's first element of token_rewards until the second walk
// overwrites it.
class RewardScatter {
 public:
  // What goes from tile to tile. A kernel that is short of registers keeps it in shared memory.
  struct State {
    int32_t segments;  // of the row
    int32_t behind;    // ends in the tiles to the right
    FirstEnd next;     // the first of them
  };

  // ends_of(items, action) gives the ends among a tile's action tokens; called from the last tile
  // to the first, and not at all where there is one tile only.
  template <class EndsOf>
  __device__ RewardScatter(Group group, const Credit& credit, SharedCurve curve, const Tiles& tiles,
                           const bool* mask, float* token_rewards, State& state, EndsOf ends_of)
      : group_(group),
        credit_(credit),
        curve_(curve),
        tiles_(tiles),
        token_rewards_(token_rewards),
        single_tile_(tiles.count() == 1),
        state_(state) {
    int32_t segments = 0;
    state_ = {0, 0, {0, false}};
    if (single_tile_) return;
    for (int32_t tile = tiles_.count() - 1; tile >= 0; --tile) {
      const Items items = tiles_.items(tile);
      const uint32_t action = load_flags(mask, items);
      const EndsBefore mine = ends_in(action, ends_of(items, action));
      const EndsBefore all = group_.scan<From::left>(mine, kNone, kNone).total;
      segments += all.ends;
      const bool last = tile + 1 == tiles_.count();
      if (group_.rank() == 0 && !last) note(tile + 1, all.since * 2 + (all.ends > 0));
    }
    // Of a row with one action token it may show at the end of the walk only that this is an end.
    state_.segments = segments == 0 ? 1 : segments;
    if (group_.rank() != 0) return;
    EndsBefore passed = kNone;
    for (int32_t tile = 1; tile < tiles_.count(); ++tile) {
      const int32_t noted = note_of(tile);
      passed = combine(passed, EndsBefore{noted % 2, noted / 2});
      note(tile, passed.since);
    }
  }

  // Takes the rewards at the tile's ends and leaves the token rewards of all its tokens.
  __device__ void operator()(int32_t tile, uint32_t action, uint32_t ends,
                             float (&rewards)[kItems]) {
    EndsBefore carried = kNone;
    // Read by the thread that wrote it, so no barrier is needed.
    if (tile > 0 && group_.rank() == 0) carried.since = note_of(tile);
    const auto passed =
        group_.scan<From::left>(combine(carried, ends_in(action, ends)), kNone, kNone);
    const int32_t segments = single_tile_ ? passed.total.ends : state_.segments;
    EndsBefore before = group_.rank() == 0 ? carried : passed.before;
    before.ends += segments - state_.behind - passed.total.ends;  // those of the tiles to the left

    // End by end and not token by token: most threads have fewer ends than tokens, and the division
    // and the logarithm of a token reward are the slowest step.
    FirstEnd first{0, false};
    uint32_t counted = 0;
    for (uint32_t ahead = ends; ahead != 0; ahead &= ahead - 1) {
      const int i = __ffs(static_cast<int>(ahead)) - 1;
      const uint32_t up_to = (2u << i) - 1;
      before = combine(before, EndsBefore{0, __popc(action & up_to & ~counted)});
      const float token_reward =
          credit_.token_reward(curve_, get(rewards, i), before.ends, segments, before.since);
      set(rewards, i, token_reward);
      first = combine(first, FirstEnd{token_reward, true});
      before = combine(before, EndsBefore{1, 0});
      counted = up_to;
    }
    const auto next = group_.scan<From::right>(first, state_.next, FirstEnd{0, false});
    float token_reward = next.before.token_reward;
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      if (has(ends, i)) token_reward = rewards[i];
      const bool credited = has(credit_.spread == Spread::last ? ends : action, i);
      rewards[i] = credited ? token_reward : 0.0f;
    }
    state_.behind += passed.total.ends;
    state_.next = next.total;
  }

 private:
  static constexpr EndsBefore kNone{0, 0};

  __device__ static EndsBefore ends_in(uint32_t action, uint32_t ends) {
    // No end leaves a mask of ones: __clz(0) is 32.
    const uint32_t behind_last = ~((1ull << (32 - __clz(ends))) - 1) & kAllItems;
    return {__popc(ends), __popc(action & behind_last)};
  }

  __device__ void note(int32_t tile, int32_t number) const {
    token_rewards_[tiles_.first(tile)] = detail::bits_to_float(static_cast<uint32_t>(number));
  }
  __device__ int32_t note_of(int32_t tile) const {
    const float bits = token_rewards_[tiles_.first(tile)];
    int32_t number;
    memcpy(&number, &bits, sizeof number);
    return number;
  }

  Group group_;
  const Credit& credit_;
  SharedCurve curve_;
  const Tiles& tiles_;
  float* token_rewards_;
  bool single_tile_;
  State& state_;
};

}  // namespace segk
