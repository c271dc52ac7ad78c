// Generalised advantage estimation over the action tokens of a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/blocks.h"
#include "cpu/flags.h"
#include "cpu/vec4d.h"
#include "segk/gae.h"

namespace segk {

constexpr Affine<double> kNoSteps{1, 0};

// What an array of rewards writes beside being read, where no token is an action; most write
// nothing.
template <class Array>
void clear(const Array&, int64_t, int64_t) {}

// Rewards and values: arrays of numbers by token, for which there is a load_vec4d(). Where there
// are no action tokens, clear(rewards, begin, end) is called and nothing is read.
template <class Rewards, class Values>
class GaeEstimator {
 public:
  GaeEstimator(Gae gae, Rewards rewards, Values values, Flags mask, float* advantages,
               float* returns)
      : gae_(gae),
        rewards_(rewards),
        values_(values),
        mask_(mask),
        advantages_(advantages),
        returns_(returns) {}

  void operator()(const Row& row, Scan<Affine<double>>& scan) const {
    scan.walk(
        row,
        [&](int64_t begin, int64_t end) {
          // Not the product of all scales: it would be subnormal for most of the way, and slow.
          const auto count = static_cast<double>(count_true(begin, end, mask_));
          return Affine<double>{std::pow(gae_.decay, count), walk<false>(begin, end, 0)};
        },
        [&](int64_t begin, int64_t end, Affine<double>, Affine<double> after) {
          walk<true>(begin, end, after(0));
        });
  }

 private:
  // Action tokens whose sums are found side by side. It decides how results are rounded.
  static constexpr int64_t kGroup = 8;
  // Where the mask has holes, so many action tokens are copied into an array at a time.
  static constexpr int64_t kGatherSize = 256;

  // What a token needs of the action token that follows it.
  struct Next {
    double value;
    double advantage;
  };

  // Walks an unbroken run of action tokens from the last to the first.
  //
  // A_i = r_i - V_i + gamma V_{i+1} + decay A_{i+1} is a chain of dependent sums. It is followed
  // once in eight tokens: within these, sums over two, four and eight are found side by side.
  template <bool kWrite, class R, class V>
  Next run(const R& rewards, const V& values, int64_t begin, int64_t end, Next next,
           float* advantages, float* returns) const {
    const double square = gae_.decay * gae_.decay;
    const double fourth = square * square;
    const Vec4d powers = vec4d(fourth, square * gae_.decay, square, gae_.decay);
    const Vec4d higher_powers = powers * broadcast(fourth);
    const auto sums = [&](Vec4d surplus, Vec4d next_value) {
      Vec4d sum = surplus + broadcast(gae_.gamma) * next_value;
      sum = sum + broadcast(gae_.decay) * one_behind(sum);
      return sum + broadcast(square) * two_behind(sum);
    };
    Vec4d next_advantage = broadcast(next.advantage);
    int64_t t = end;
    for (; t - begin >= kGroup; t -= kGroup) {
      const Vec4d late_value = load_vec4d(values, t - 4);
      const Vec4d early_value = load_vec4d(values, t - 8);
      const Vec4d late_next = t < end
                                  ? load_vec4d(values, t - 3)
                                  : vec4d(values[t - 3], values[t - 2], values[t - 1], next.value);
      const Vec4d late = sums(load_vec4d(rewards, t - 4) - late_value, late_next);
      const Vec4d early =
          sums(load_vec4d(rewards, t - 8) - early_value, load_vec4d(values, t - 7)) +
          powers * broadcast_first(late);
      if constexpr (kWrite) {
        const Vec4d late_advantage = late + powers * next_advantage;
        const Vec4d early_advantage = early + higher_powers * next_advantage;
        store_floats(advantages + t - 4, late_advantage);
        store_floats(advantages + t - 8, early_advantage);
        store_floats(returns + t - 4, late_advantage + late_value);
        store_floats(returns + t - 8, early_advantage + early_value);
      }
      next_advantage = broadcast_first(early) + broadcast_first(higher_powers) * next_advantage;
    }
    if (t < end) next = {values[t], first_of(next_advantage)};
    while (t-- > begin) {
      const double value = values[t];
      next.advantage = rewards[t] - value + gae_.gamma * next.value + gae_.decay * next.advantage;
      next.value = value;
      if constexpr (kWrite) {
        advantages[t] = static_cast<float>(next.advantage);
        returns[t] = static_cast<float>(next.advantage + value);
      }
    }
    return next;
  }

  // The same of n tokens between which the mask has holes.
  template <bool kWrite>
  Next gather(const int64_t* tokens, int64_t n, Next next) const {
    double rewards[kGatherSize];
    double values[kGatherSize];
    float advantages[kGatherSize];
    float returns[kGatherSize];
    for (int64_t i = 0; i < n; ++i) {
      rewards[i] = rewards_[tokens[i]];
      values[i] = values_[tokens[i]];
    }
    next = run<kWrite>(rewards, values, 0, n, next, advantages, returns);
    for (int64_t i = 0; kWrite && i < n; ++i) {
      advantages_[tokens[i]] = advantages[i];
      returns_[tokens[i]] = returns[i];
    }
    return next;
  }

  // From the last action token of a block to its first, given x (see Gae) of the action token that
  // follows the block; returns x of the block's first. Groups are counted off from the block's last
  // action token, so holes in the mask change no result.
  template <bool kWrite>
  double walk(int64_t begin, int64_t end, double carried) const {
    Next next{gae_.gamma > 0 ? carried / gae_.gamma : 0, 0};
    for (int64_t stop = end;;) {
      const int64_t last = last_true(begin, stop, mask_);
      if constexpr (kWrite) skip(last + 1, stop);
      if (last < begin) break;
      stop = last + 1;
      int64_t start = run_true(begin, stop, mask_);
      // Tokens that do not fill a group are left to the next step, unless they are the first.
      if (last_true(begin, start, mask_) >= begin) start += (stop - start) % kGroup;
      if (start < stop) {
        next = run<kWrite>(rewards_, values_, start, stop, next, advantages_, returns_);
      } else {
        int64_t tokens[kGatherSize];
        int64_t first = kGatherSize;
        while (first > 0 && start > begin) {
          if (mask_[--start]) tokens[--first] = start;
        }
        if constexpr (kWrite) skip(start, stop);
        next = gather<kWrite>(tokens + first, kGatherSize - first, next);
      }
      stop = start;
    }
    return gae_.gamma * next.value + gae_.decay * next.advantage;
  }

  void skip(int64_t begin, int64_t end) const {
    clear(rewards_, begin, end);
    for (float* out : {advantages_, returns_}) std::fill(out + begin, out + end, 0.0f);
  }

  Gae gae_;
  Rewards rewards_;
  Values values_;
  Flags mask_;
  float* advantages_;
  float* returns_;
};

}  // namespace segk
