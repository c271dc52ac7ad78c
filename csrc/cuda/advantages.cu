#include <cooperative_groups.h>

#include "cuda/launch.cuh"
#include "cuda/scan.cuh"
#include "cuda/tokens.cuh"
#include "segk/advantages.h"
#include "segk/operators.h"

namespace segk {
namespace {

constexpr int kMaxKnots = 64;

// A Credit whose knots come along: on the host they are in the host's memory.
struct PortableCredit {
  Credit credit;
  float knots[3 * kMaxKnots];

  PortableCredit(const char* op, const Credit& from) : credit(from), knots{} {
    const int32_t count = from.curve.n_knots;
    if (count > kMaxKnots) {
      throw std::invalid_argument(std::string(op) + ": normalizer: expected at most " +
                                  std::to_string(kMaxKnots) + " knots, got " +
                                  std::to_string(count) + "; merge neighbouring ones");
    }
    std::copy_n(from.curve.knots, 3 * count, knots);
  }
  __device__ Credit here() const {
    Credit copy = credit;
    copy.curve.knots = knots;
    return copy;
  }
};

struct Pay {
  Floats rewards;
  const bool* ends;
  const bool* mask;
  Rows rows;
  PortableCredit credit;
  float* token_rewards;
  int rows_per_block;
};

// Pays the rewards of one row's segments to its tokens, tile by tile from the last to the first.
// How long a segment is that reaches into a tile from the left is found in a walk over the flags
// before that, and kept in the tile's first token of token_rewards until it is paid.
class PaidRow {
 public:
  __device__ PaidRow(Group group, const Pay& pay, const Credit& credit, const Tiles& tiles)
      : group_(group), pay_(pay), credit_(credit), tiles_(tiles), in_one_(tiles.count() == 1) {
    if (in_one_) return;
    Passed passed = kNothingPassed;
    for (int32_t tile = 0; tile < tiles_.count(); ++tile) {
      if (tile > 0 && group_.rank() == 0) {
        pay_.token_rewards[tiles_.first(tile)] =
            detail::bits_to_float(static_cast<uint32_t>(passed.since));
      }
      const Octet octet = tiles_.octet(tile);
      const uint32_t action = load_flags(pay_.mask, octet);
      const Passed mine = passed_in(action, load_flags(pay_.ends, octet) & action);
      passed = group_.scan<From::left>(mine, passed, kNothingPassed).total;
    }
    segments_ = passed.ends;
  }

  // `rewards` of the tile's ends in, token rewards of all its tokens out.
  __device__ void pay(int32_t tile, uint32_t action, uint32_t ends, float (&rewards)[kItems]) {
    Passed carried = kNothingPassed;
    // The thread that wrote it reads it, so nobody has to be waited for.
    if (tile > 0 && group_.rank() == 0) {
      const float bits = pay_.token_rewards[tiles_.first(tile)];
      memcpy(&carried.since, &bits, sizeof bits);
    }
    const auto passed = group_.scan<From::left>(combine(carried, passed_in(action, ends)),
                                                kNothingPassed, kNothingPassed);
    if (in_one_) segments_ = passed.total.ends;
    Passed before = group_.rank() == 0 ? carried : passed.before;
    before.ends += segments_ - behind_ - passed.total.ends;  // those of the tiles to the left

    // End by end and not token by token: most threads have fewer ends than tokens, and paying is
    // the dearest step.
    FirstEnd first{0, false};
    uint32_t counted = 0;
    for (uint32_t ahead = ends; ahead != 0; ahead &= ahead - 1) {
      const int i = __ffs(static_cast<int>(ahead)) - 1;
      const uint32_t up_to = (2u << i) - 1;
      before = combine(before, Passed{0, __popc(action & up_to & ~counted)});
      const float share = credit_(get(rewards, i), before.ends, segments_, before.since);
      set(rewards, i, share);
      first = combine(first, FirstEnd{share, true});
      before = combine(before, Passed{1, 0});
      counted = up_to;
    }
    const auto next = group_.scan<From::right>(first, next_, FirstEnd{0, false});
    float share = next.before.pays;
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      if (has(ends, i)) share = rewards[i];
      const bool paid = has(credit_.spread == Spread::last ? ends : action, i);
      rewards[i] = paid ? share : 0.0f;
    }
    behind_ += passed.total.ends;
    next_ = next.total;
  }

 private:
  static constexpr Passed kNothingPassed{0, 0};

  __device__ static Passed passed_in(uint32_t action, uint32_t ends) {
    // No end leaves a mask of ones: __clz(0) is 32.
    const uint32_t behind_last = ~((1ull << (32 - __clz(ends))) - 1) & kAllItems;
    return {__popc(ends), __popc(action & behind_last)};
  }

  Group group_;
  const Pay& pay_;
  const Credit& credit_;
  const Tiles& tiles_;
  bool in_one_;
  int32_t segments_ = 0;
  int32_t behind_ = 0;       // ends in the tiles to the right
  FirstEnd next_{0, false};  // the first of them
};

__global__ void __launch_bounds__(kMaxThreads, 2)
    scatter_segment_rewards_kernel(const __grid_constant__ Pay a) {
  const Credit credit = a.credit.here();
  for_each_row(a.rows, int64_t{blockIdx.x} * a.rows_per_block, a.rows_per_block,
               [&](Group group, int64_t, int64_t begin, int64_t end) {
                 const Tiles tiles(group, begin, end);
                 PaidRow row(group, a, credit, tiles);
                 for (int32_t tile = tiles.count() - 1; tile >= 0; --tile) {
                   const Octet octet = tiles.octet(tile);
                   const uint32_t action = load_flags(a.mask, octet);
                   const uint32_t ends = load_flags(a.ends, octet) & action;
                   float rewards[kItems];
                   load(a.rewards, octet, ends, rewards);
                   row.pay(tile, action, ends, rewards);
                   store(rewards, a.token_rewards, octet);
                 }
               });
}

// One tile of the backward scan. reward(i) and value(i) are those of the action tokens; `ahead` is
// what the next tile leaves to this one, and then what this one leaves.
template <class Reward, class Value>
__device__ void estimate(Group group, const Gae& gae, uint32_t action, Reward reward, Value value,
                         double& ahead, float (&advantages)[kItems], float (&returns)[kItems]) {
  const Affine<double> nothing{1, 0};
  Affine<double> mine = nothing;
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    if (has(action, i)) mine = combine(gae.leaves(reward(i), value(i)), mine);
  }
  // A constant map ends every composition with it: the shift is the value.
  const auto scanned = group.scan<From::right>(mine, Affine<double>{0, ahead}, nothing);
  double left = scanned.before.shift;
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    advantages[i] = returns[i] = 0;
    if (!has(action, i)) continue;
    const double r = reward(i);
    const double v = value(i);
    const double advantage = Gae::advantage(r, v, left);
    advantages[i] = static_cast<float>(advantage);
    returns[i] = static_cast<float>(advantage + v);
    left = gae.leaves(r, v)(left);
  }
  ahead = scanned.total.shift;
}

struct Estimate {
  Floats rewards;
  Floats values;
  const bool* mask;
  Rows rows;
  Gae gae;
  float* advantages;
  float* returns;
  int rows_per_block;
};

__global__ void __launch_bounds__(kMaxThreads, 2) gae_kernel(const Estimate a) {
  for_each_row(a.rows, int64_t{blockIdx.x} * a.rows_per_block, a.rows_per_block,
               [&](Group group, int64_t, int64_t begin, int64_t end) {
                 const Tiles tiles(group, begin, end);
                 double ahead = 0;
                 for (int32_t tile = tiles.count() - 1; tile >= 0; --tile) {
                   const Octet octet = tiles.octet(tile);
                   const uint32_t action = load_flags(a.mask, octet);
                   float rewards[kItems], values[kItems], advantages[kItems], returns[kItems];
                   load(a.rewards, octet, action, rewards);
                   load(a.values, octet, action, values);
                   const auto reward = [&](int i) { return rewards[i]; };
                   const auto value = [&](int i) { return values[i]; };
                   estimate(group, a.gae, action, reward, value, ahead, advantages, returns);
                   store(advantages, a.advantages, octet);
                   store(returns, a.returns, octet);
                 }
               });
}

struct Advantages {
  Pay pay;
  Floats logprobs;
  Floats ref_logprobs;
  Floats values;
  double kl_coef;
  Gae gae;
  float* advantages;
  float* returns;
  float* kl;
};

__global__ void __launch_bounds__(kMaxThreads, 2)
    segment_advantages_kernel(const __grid_constant__ Advantages a) {
  // Each thread's own, while it pays the rewards: in registers they would be spilled.
  __shared__ float values[kItems][kMaxThreads];
  __shared__ float kl[kItems][kMaxThreads];
  const unsigned mine = threadIdx.x;
  const Credit credit = a.pay.credit.here();
  for_each_row(a.pay.rows, int64_t{blockIdx.x} * a.pay.rows_per_block, a.pay.rows_per_block,
               [&](Group group, int64_t, int64_t begin, int64_t end) {
                 const Tiles tiles(group, begin, end);
                 PaidRow row(group, a.pay, credit, tiles);
                 double ahead = 0;
                 for (int32_t tile = tiles.count() - 1; tile >= 0; --tile) {
                   const Octet octet = tiles.octet(tile);
                   const uint32_t action = load_flags(a.pay.mask, octet);
                   const uint32_t ends = load_flags(a.pay.ends, octet) & action;
                   float rewards[kItems], x[kItems], of_ref[kItems], v[kItems];
                   load(a.values, octet, action, v);
                   load(a.logprobs, octet, action, x);
                   load(a.ref_logprobs, octet, action, of_ref);
#pragma unroll
                   for (int i = 0; i < kItems; ++i) {
                     x[i] = has(action, i) ? x[i] - of_ref[i] : 0.0f;
                     kl[i][mine] = x[i];
                     values[i][mine] = v[i];
                   }
                   load(a.pay.rewards, octet, ends, rewards);
                   store(x, a.kl, octet);
                   row.pay(tile, action, ends, rewards);
                   store(rewards, a.pay.token_rewards, octet);

                   float advantages[kItems], returns[kItems];
                   const auto reward = [&](int i) { return rewards[i] - a.kl_coef * kl[i][mine]; };
                   const auto value = [&](int i) { return values[i][mine]; };
                   estimate(group, a.gae, action, reward, value, ahead, advantages, returns);
                   store(advantages, a.advantages, octet);
                   store(returns, a.returns, octet);
                 }
               });
}

struct Summed {
  Floats x;
  const bool* mask;
  int64_t n;
  Moments* parts;
  int64_t n_parts;
  double* moments;
};

__global__ void __launch_bounds__(kMaxThreads, 2) moments_kernel(const Summed a) {
  static_assert(sizeof(Moments) <= kBytesPerPart, "fits the scratch memory");
  const auto grid = cooperative_groups::this_grid();
  const Group block(true);
  const Moments nothing{0, 0, 0};
  for (int64_t part = blockIdx.x; part < a.n_parts; part += gridDim.x) {
    Moments mine = nothing;
    for (int64_t octets = part * block.size(); octets * kItems < a.n;
         octets += a.n_parts * block.size()) {
      const Octet octet = octet_of((octets + block.rank()) * kItems, a.n);
      const uint32_t action = load_flags(a.mask, octet);
      if (action == 0) continue;
      float x[kItems];
      load(a.x, octet, action, x);
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
    const Moments sum = block.scan<From::left>(mine, nothing, nothing).total;
    if (block.rank() == 0) a.parts[part] = sum;
  }
  grid.sync();

  if (blockIdx.x != 0) return;
  const Moments all = sum_of_parts(a.parts, a.n_parts, nothing);
  if (block.rank() == 0) {
    a.moments[0] = all.count;
    a.moments[1] = all.mean;
    a.moments[2] = all.m2;
  }
}

struct Whiten {
  Floats x;
  const bool* mask;
  int64_t n;
  const double* moments;
  bool center;
  float* out;
};

__global__ void __launch_bounds__(kMaxThreads, 2) whiten_kernel(const Whiten a) {
  const Whitening whitened({a.moments[0], a.moments[1], a.moments[2]}, a.center);
  const Octet octet = octet_of((int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kItems, a.n);
  const uint32_t action = load_flags(a.mask, octet);
  float x[kItems];
  load(a.x, octet, action, x);
#pragma unroll
  for (int i = 0; i < kItems; ++i) x[i] = has(action, i) ? whitened(x[i]) : 0.0f;
  store(x, a.out, octet);
}

// A loss over tokens; Term is what one of them adds, a function of three streams.
template <class Term>
struct Loss {
  Term term;
  Floats x;
  Floats old;
  Floats target;
  const bool* mask;
  Rows rows;
  Aggregation aggregation;
  float* loss;
  double* row_weights;
  LossSums* parts;
  int64_t n_parts;
  int64_t groups;
  int rows_per_block;
};

template <class Term>
__global__ void __launch_bounds__(kMaxThreads, 2) loss_kernel(const Loss<Term> a) {
  static_assert(sizeof(LossSums) <= kBytesPerPart, "fits the scratch memory");
  const auto grid = cooperative_groups::this_grid();
  const Group block(true);
  const LossSums nothing{0, 0, 0};
  for (int64_t part = blockIdx.x; part < a.n_parts; part += gridDim.x) {
    LossSums of_part = nothing;  // of the rows that this thread was the first one of
    for (int64_t rows = part; rows < a.groups; rows += a.n_parts) {
      for_each_row(a.rows, rows * a.rows_per_block, a.rows_per_block,
                   [&](Group group, int64_t row, int64_t begin, int64_t end) {
                     const Tiles tiles(group, begin, end);
                     SegmentSum mine{0, 0};
                     for (int32_t tile = 0; tile < tiles.count(); ++tile) {
                       const Octet octet = tiles.octet(tile);
                       const uint32_t action = load_flags(a.mask, octet);
                       float x[kItems], old[kItems], target[kItems];
                       load(a.x, octet, action, x);
                       load(a.old, octet, action, old);
                       load(a.target, octet, action, target);
#pragma unroll
                       for (int i = 0; i < kItems; ++i) {
                         if (has(action, i)) mine.sum += a.term.loss(x[i], old[i], target[i]);
                       }
                       mine.count += __popc(action);
                     }
                     const SegmentSum zero{0, 0};
                     const SegmentSum sum = group.scan<From::left>(mine, zero, zero).total;
                     if (group.rank() != 0) return;
                     a.row_weights[row] = sum.count;
                     if (sum.count == 0) return;
                     const double weight = token_weight(a.aggregation, sum.count, 1, 1);
                     const double tokens = sum.count;
                     of_part = combine(of_part, LossSums{weight * sum.sum, tokens, 1});
                   });
    }
    const LossSums sum = block.scan<From::left>(of_part, nothing, nothing).total;
    if (block.rank() == 0) a.parts[part] = sum;
  }
  grid.sync();

  const LossSums all = sum_of_parts(a.parts, a.n_parts, nothing);
  for (int64_t row = int64_t{blockIdx.x} * block.size() + block.rank(); row < a.rows.count;
       row += int64_t{gridDim.x} * block.size()) {
    a.row_weights[row] = token_weight(a.aggregation, a.row_weights[row], all.tokens, all.seqs);
  }
  if (blockIdx.x == 0 && block.rank() == 0) {
    const double none_or_one = all.seqs > 0 ? 1 : 0;
    *a.loss = static_cast<float>(all.terms *
                                 token_weight(a.aggregation, none_or_one, all.tokens, all.seqs));
  }
}

template <class Term>
struct Slopes {
  Term term;
  const float* dloss;
  Floats x;
  Floats old;
  Floats target;
  const bool* mask;
  Rows rows;
  const double* row_weights;
  float* out;
  int rows_per_block;
};

template <class Term>
__global__ void __launch_bounds__(kMaxThreads, 2) slopes_kernel(const Slopes<Term> a) {
  for_each_row(a.rows, int64_t{blockIdx.x} * a.rows_per_block, a.rows_per_block,
               [&](Group group, int64_t row, int64_t begin, int64_t end) {
                 const float weight = static_cast<float>(*a.dloss * a.row_weights[row]);
                 const Tiles tiles(group, begin, end);
                 for (int32_t tile = 0; tile < tiles.count(); ++tile) {
                   const Octet octet = tiles.octet(tile);
                   const uint32_t action = load_flags(a.mask, octet);
                   float x[kItems], old[kItems], target[kItems];
                   load(a.x, octet, action, x);
                   load(a.old, octet, action, old);
                   load(a.target, octet, action, target);
#pragma unroll
                   for (int i = 0; i < kItems; ++i) {
                     x[i] = has(action, i) ? weight * a.term.slope(x[i], old[i], target[i]) : 0.0f;
                   }
                   store(x, a.out, octet);
                 }
               });
}

template <class Term>
void loss_fwd(const char* op, Term term, Floats x, Floats old, Floats target, const bool* mask,
              Rows rows, Aggregation aggregation, float* loss, double* row_weights, void* scratch,
              Place place) {
  const Division division(rows);
  const int64_t parts = std::min(division.groups, kParts);
  const Loss<Term> args{term,         x,
                        old,          target,
                        mask,         rows,
                        aggregation,  loss,
                        row_weights,  static_cast<LossSums*>(scratch),
                        parts,        division.groups,
                        division.rows};
  launch_together(op, loss_kernel<Term>, args, parts, division.threads, loss, place);
}

template <class Term>
void loss_bwd(const char* op, Term term, const float* dloss, Floats x, Floats old, Floats target,
              const bool* mask, Rows rows, const double* row_weights, float* out, Place place) {
  const Division division(rows);
  const Slopes<Term> args{term, dloss, x, old, target, mask, rows, row_weights, out, division.rows};
  launch(op, slopes_kernel<Term>, args, division.groups, division.threads, out, place);
}

}  // namespace

void scatter_segment_rewards_fwd(Floats rewards, const bool* ends, const bool* mask, Rows rows,
                                 Credit credit, float* out, Place place) {
  constexpr char op[] = "scatter_segment_rewards";
  const Division division(rows);
  const Pay args{rewards, ends, mask, rows, PortableCredit(op, credit), out, division.rows};
  launch(op, scatter_segment_rewards_kernel, args, division.groups, division.threads, out, place);
}

void gae_fwd(Floats rewards, Floats values, const bool* mask, Rows rows, double gamma, double lam,
             float* advantages, float* returns, Place place) {
  const Division division(rows);
  const Estimate args{rewards,    values,  mask,         rows, {gamma, gamma * lam},
                      advantages, returns, division.rows};
  launch("gae", gae_kernel, args, division.groups, division.threads, advantages, place);
}

void segment_advantages_fwd(Floats rewards, const bool* ends, Floats logprobs, Floats ref_logprobs,
                            Floats values, const bool* mask, Rows rows, Credit credit,
                            double kl_coef, double gamma, double lam, float* advantages,
                            float* returns, float* token_rewards, float* kl, Place place) {
  constexpr char op[] = "segment_advantages";
  const Division division(rows);
  const Advantages args{
      {rewards, ends, mask, rows, PortableCredit(op, credit), token_rewards, division.rows},
      logprobs,
      ref_logprobs,
      values,
      kl_coef,
      {gamma, gamma * lam},
      advantages,
      returns,
      kl};
  launch(op, segment_advantages_kernel, args, division.groups, division.threads, advantages, place);
}

void moments_fwd(Floats x, const bool* mask, int64_t n, double* moments, void* scratch,
                 Place place) {
  constexpr int kThreads = 256;
  const int64_t parts = std::min(ceil_div(n, int64_t{kThreads} * kItems), kParts);
  const Summed args{x, mask, n, static_cast<Moments*>(scratch), parts, moments};
  launch_together("moments", moments_kernel, args, parts, kThreads, moments, place);
}

void whiten_fwd(Floats x, const bool* mask, int64_t n, const double* moments, bool center,
                float* out, Place place) {
  constexpr int kThreads = 256;
  const Whiten args{x, mask, n, moments, center, out};
  launch("whiten", whiten_kernel, args, ceil_div(n, int64_t{kThreads} * kItems), kThreads, out,
         place);
}

void policy_loss_fwd(Floats logprobs, Floats old_logprobs, Floats advantages, const bool* mask,
                     Rows rows, float low, float high, Aggregation aggregation, float* loss,
                     double* row_weights, void* scratch, Place place) {
  loss_fwd("policy_loss", PolicyTerm{low, high}, logprobs, old_logprobs, advantages, mask, rows,
           aggregation, loss, row_weights, scratch, place);
}

void policy_loss_bwd(const float* dloss, Floats logprobs, Floats old_logprobs, Floats advantages,
                     const bool* mask, Rows rows, float low, float high, const double* row_weights,
                     float* dlogprobs, Place place) {
  loss_bwd("policy_loss, backward", PolicyTerm{low, high}, dloss, logprobs, old_logprobs,
           advantages, mask, rows, row_weights, dlogprobs, place);
}

void value_loss_fwd(Floats values, Floats old_values, Floats returns, const bool* mask, Rows rows,
                    float clip, Aggregation aggregation, float* loss, double* row_weights,
                    void* scratch, Place place) {
  loss_fwd("value_loss", ValueTerm{clip}, values, old_values, returns, mask, rows, aggregation,
           loss, row_weights, scratch, place);
}

void value_loss_bwd(const float* dloss, Floats values, Floats old_values, Floats returns,
                    const bool* mask, Rows rows, float clip, const double* row_weights,
                    float* dvalues, Place place) {
  loss_bwd("value_loss, backward", ValueTerm{clip}, dloss, values, old_values, returns, mask, rows,
           row_weights, dvalues, place);
}

}  // namespace segk
