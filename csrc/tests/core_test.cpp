// The C++ core without Python, built for the sanitizers (make sanitize): every op over ragged
// layouts against plain loops in double. Memory has exactly the size that an op may touch, is
// aligned to its element alone, and tokens that may not be read hold NaN.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/elementary.h"
#include "segk/advantages.h"
#include "segk/bradley_terry.h"
#include "segk/gae.h"
#include "segk/isa.h"
#include "segk/ppo_loss.h"
#include "segk/rewards.h"
#include "segk/running_normalizer.h"
#include "segk/segments.h"
#include "segk/vocab.h"
#include "segk/whiten.h"

namespace {

using namespace segk;

std::atomic<int> failures{0};
thread_local std::string where;

void fail(const std::string& what) {
  if (++failures <= 20) std::fprintf(stderr, "FAILED %s: %s\n", where.c_str(), what.c_str());
}

void check(bool holds, const char* what) {
  if (!holds) fail(what);
}

constexpr double kRoundings = 32;

// |got - want| <= 32 roundings of the largest value wanted in its group of `group` neighbours, or
// of `floor` where sums cancel; NaN and infinities stand where they are wanted. `eps` is that of
// the storage of `got`.
template <class Got>
void check_close(const std::string& what, const Got& got, const std::vector<double>& want,
                 double floor = 0, size_t group = SIZE_MAX, double eps = 0) {
  double allowed = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (i % group == 0) {
      double scale = floor;
      for (size_t j = i; j < want.size() && j - i < group; ++j) {
        if (std::isfinite(want[j])) scale = std::max(scale, std::fabs(want[j]));
      }
      allowed = (kRoundings * FLT_EPSILON + eps) * scale;
    }
    const double g = got[i];
    if (std::isnan(want[i]) ? std::isnan(g) : g == want[i] || std::fabs(g - want[i]) <= allowed) {
      continue;
    }
    char text[100];
    std::snprintf(text, sizeof text, "[%zu] is %.9g, expected %.9g +- %.1g", i, g, want[i],
                  allowed);
    return fail(what + text);
  }
}

// Which memory arrays get: `heap` blocks, whose both sides AddressSanitizer watches, or pages whose
// last byte lies before one that nothing may touch, instrumented or not.
enum class Memory { heap, guarded };
thread_local Memory memory = Memory::heap;

template <class T>
class Array {
 public:
  explicit Array(int64_t n = 0, T fill = T{}) : size_(static_cast<size_t>(n)) {
    const size_t bytes = size_ * sizeof(T);
    if (memory == Memory::heap) {
      // One element in front: an address that only the element's own size divides.
      block_ = {new char[bytes + sizeof(T)], [](char* p) { delete[] p; }};
      data_ = reinterpret_cast<T*>(block_.get() + sizeof(T));
    } else {
      const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      const size_t room = (bytes + page - 1) / page * page;
      void* pages =
          mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (pages == MAP_FAILED || mprotect(static_cast<char*>(pages) + room, page, PROT_NONE)) {
        throw std::runtime_error("no memory for a guarded array");
      }
      block_ = {static_cast<char*>(pages), [room, page](char* p) { munmap(p, room + page); }};
      data_ = reinterpret_cast<T*>(block_.get() + (room - bytes));
    }
    std::fill(data_, data_ + size_, fill);
  }

  T* get() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return size_; }

 private:
  size_t size_;
  std::shared_ptr<char> block_;
  T* data_;
};

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16};

double epsilon(DType dtype) {
  return dtype == DType::f32 ? 0 : dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
}

int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

uint16_t half_bits(double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7e00;
  x = std::fabs(x);
  if (x >= 65520) return sign | 0x7c00;
  const int exponent = std::max(x > 0 ? std::ilogb(x) : -14, -14);
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(x, 10 - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + steps));
}

// Numbers as an op stores them; reads as double.
class Stored {
 public:
  Stored(DType dtype, const std::vector<double>& values) : dtype_(dtype) {
    const auto n = static_cast<int64_t>(values.size());
    if (dtype == DType::f32) {
      wide_ = Array<float>(n);
      std::copy(values.begin(), values.end(), wide_.get());
      return;
    }
    half_ = Array<uint16_t>(n);
    for (size_t i = 0; i < values.size(); ++i) half_[i] = encode(values[i]);
  }

  const void* data() const {
    return dtype_ == DType::f32 ? static_cast<const void*>(wide_.get()) : half_.get();
  }
  void* data() { return const_cast<void*>(static_cast<const Stored*>(this)->data()); }
  operator Floats() const { return {data(), dtype_}; }
  double operator[](size_t i) const { return Floats(*this)[static_cast<int64_t>(i)]; }

 private:
  uint16_t encode(double value) const {
    if (dtype_ == DType::f16) return half_bits(value);
    const auto narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    if (std::isnan(value)) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }

  DType dtype_;
  Array<float> wide_;
  Array<uint16_t> half_;
};

using Random = std::mt19937_64;

double uniform(Random& random) { return std::uniform_real_distribution<double>()(random); }
double normal(Random& random) { return std::normal_distribution<double>()(random); }

enum class Keep { all, holes, none, one };

// A token stream: rows, which may be the padded or the packed form, and its action tokens.
struct Stream {
  std::vector<int64_t> begins;  // [N + 1]
  Array<int32_t> cu_seqlens;
  Rows rows;
  Array<bool> mask;
  std::vector<std::vector<size_t>> actions;  // of each row

  int64_t tokens() const { return begins.back(); }
  int64_t count() const { return rows.count; }

  Stored random_values(DType dtype, Random& random, double scale = 1) const {
    std::vector<double> values(static_cast<size_t>(tokens()));
    for (size_t t = 0; t < values.size(); ++t) values[t] = mask[t] ? scale * normal(random) : NAN;
    return {dtype, values};
  }
};

Stream stream_of(const std::vector<int64_t>& lengths, bool packed, Keep keep, Random& random) {
  Stream s;
  s.begins = {0};
  for (int64_t length : lengths) s.begins.push_back(s.begins.back() + length);
  const auto n = static_cast<int64_t>(lengths.size());
  if (packed) {
    s.cu_seqlens = Array<int32_t>(n + 1);
    for (size_t i = 0; i < s.begins.size(); ++i) {
      s.cu_seqlens[i] = static_cast<int32_t>(s.begins[i]);
    }
  }
  s.rows = {n, packed || !n ? 0 : lengths[0], packed ? s.cu_seqlens.get() : nullptr};
  s.mask = Array<bool>(s.tokens());
  s.actions.resize(lengths.size());
  for (size_t row = 0; row < lengths.size(); ++row) {
    const auto begin = static_cast<size_t>(s.begins[row]);
    const auto end = static_cast<size_t>(s.begins[row + 1]);
    for (size_t t = begin; t < end; ++t) {
      s.mask[t] = keep == Keep::all || (keep == Keep::holes && uniform(random) < 0.7) ||
                  (keep == Keep::one && t == (begin + end) / 2);
      if (s.mask[t]) s.actions[row].push_back(t);
    }
  }
  return s;
}

struct Shape {
  const char* name;
  std::vector<int64_t> lengths;
  bool packed;
};

std::vector<Shape> shapes() {
  std::vector<int64_t> tiny(12000);
  for (size_t i = 0; i < tiny.size(); ++i) tiny[i] = static_cast<int64_t>(i * 7 % 4);
  return {
      {"packed, no row", {}, true},
      {"packed, one empty row", {0}, true},
      {"packed, one token", {1}, true},
      {"packed, empty rows", {0, 5, 0, 0, 3, 0}, true},
      {"packed, around vectors", {1, 2, 31, 32, 33, 63, 64, 65, 1023, 1025}, true},
      {"packed, giant row", {3, 90001, 0, 40}, true},
      {"packed, tiny rows", tiny, true},
      {"grid, no row", {}, false},
      {"grid, rows of nothing", {0, 0, 0, 0}, false},
      {"grid, one token", {1}, false},
      {"grid, small", {33, 33, 33, 33}, false},
      {"grid, long", {17001, 17001, 17001}, false},
      {"grid, many", std::vector<int64_t>(1100, 17), false},
  };
}

// Asked of every op; small streams use one of them.
constexpr int kThreads = 3;
constexpr int64_t kLarge = 10000;  // tokens; two of the combinations are enough then

template <class Body>
void for_each_stream(Body body) {
  constexpr Keep keeps[] = {Keep::all, Keep::holes, Keep::none, Keep::one};
  const char* names[] = {"all", "holes", "none", "one"};
  for (const Shape& shape : shapes()) {
    for (int k = 0; k < 4; ++k) {
      for (int d = 0; d < 3; ++d) {
        Random random(static_cast<uint64_t>(k));
        const Stream stream = stream_of(shape.lengths, shape.packed, keeps[k], random);
        if (stream.tokens() > kLarge && (d != k || k > 1)) continue;
        where = std::string(shape.name) + ", actions " + names[k] + ", dtype " + std::to_string(d);
        body(stream, kDTypes[d], random);
      }
    }
  }
}

std::vector<double> zeros(int64_t n) { return std::vector<double>(static_cast<size_t>(n)); }

// Outputs begin as numbers that no op writes, so that a token left out shows.
Array<float> unwritten(int64_t n) { return Array<float>(n, 12345.0f); }

// Those outside the mask mean nothing.
Array<bool> random_ends(const Stream& s, Random& random) {
  Array<bool> ends(s.tokens());
  const double share = uniform(random) < 0.5 ? 0.4 : 0.0001;
  for (size_t t = 0; t < ends.size(); ++t) ends[t] = uniform(random) < share;
  for (const auto& row : s.actions) {
    // Some rows end behind their last end, some at it, some have none.
    if (!row.empty()) ends[row.back()] = uniform(random) < 0.5;
  }
  return ends;
}

void test_segment_ends(const Stream& s, DType dtype, Random& random) {
  const Stored entropy = s.random_values(dtype, random);
  Array<bool> exclude_last(s.count());
  for (size_t row = 0; row < exclude_last.size(); ++row) exclude_last[row] = uniform(random) < 0.5;
  const double threshold = 0.5;
  for (int form = 0; form < 4; ++form) {
    const bool current = form & 1;
    const bool by_row = form & 2;
    Array<bool> want(s.tokens());
    for (size_t row = 0; row < s.actions.size(); ++row) {
      const auto& a = s.actions[row];
      const size_t m = a.size();
      const bool excluded = (!by_row || exclude_last[row]) && m > 1;
      for (size_t i = 0; i < m; ++i) {
        const bool over =
            current ? i + 1 < m && entropy[a[i + 1]] > threshold : entropy[a[i]] > threshold;
        want[a[i]] = i + 1 == m ? !excluded : over || (excluded && i + 2 == m);
      }
    }
    Array<bool> ends(s.tokens(), true);
    const Boundaries boundaries{static_cast<float>(threshold), current,
                                by_row ? exclude_last.get() : nullptr, !by_row};
    const int64_t nan =
        segment_ends(entropy, s.mask.get(), s.rows, boundaries, ends.get(), kThreads);
    check(nan == -1, "segment_ends: a NaN where there is none");
    check(std::equal(ends.get(), ends.get() + ends.size(), want.get()), "segment_ends");
  }
}

void test_segment_ends_nan(const Stream& s, DType dtype, Random& random) {
  std::vector<size_t> all;
  for (const auto& row : s.actions) all.insert(all.end(), row.begin(), row.end());
  if (all.size() < 2) return;
  std::vector<double> entropy(static_cast<size_t>(s.tokens()), 1.0);
  const size_t first = all.size() / 2;
  entropy[all[first]] = entropy[all.back()] = NAN;
  Array<bool> ends(s.tokens());
  const Boundaries boundaries{0.5f, false, nullptr, uniform(random) < 0.5};
  const int64_t nan =
      segment_ends(Stored(dtype, entropy), s.mask.get(), s.rows, boundaries, ends.get(), kThreads);
  check(nan == static_cast<int64_t>(all[first]), "segment_ends: the first NaN");
}

struct Scores {
  std::vector<double> scores;
  std::vector<int32_t> counts;
};

Scores naive_scores(const Stream& s, const Stored& rewards, const Array<bool>& ends, bool mean) {
  Scores out;
  for (const auto& row : s.actions) {
    double sum = 0;
    int32_t count = 0;
    for (size_t t : row) {
      if (!ends[t]) continue;
      sum += rewards[t];
      ++count;
    }
    out.scores.push_back(mean && count ? sum / count : sum);
    out.counts.push_back(count);
  }
  return out;
}

std::vector<double> naive_score_gradient(const Stream& s, const Array<bool>& ends,
                                         const std::vector<double>& dscores, bool mean) {
  std::vector<double> want = zeros(s.tokens());
  for (size_t row = 0; row < s.actions.size(); ++row) {
    const auto& a = s.actions[row];
    const auto count = std::count_if(a.begin(), a.end(), [&](size_t t) { return ends[t]; });
    for (size_t t : a) {
      if (ends[t]) want[t] = mean ? dscores[row] / static_cast<double>(count) : dscores[row];
    }
  }
  return want;
}

void test_segment_scores(const Stream& s, DType dtype, Random& random) {
  const Stored rewards = s.random_values(dtype, random);
  const Array<bool> ends = random_ends(s, random);
  Array<bool> inside(s.tokens());
  for (size_t t = 0; t < inside.size(); ++t) inside[t] = ends[t] && s.mask[t];
  std::vector<double> dwant(static_cast<size_t>(s.count()));
  for (double& d : dwant) d = normal(random);
  const Stored dscores(DType::f32, dwant);
  for (size_t row = 0; row < dwant.size(); ++row) dwant[row] = dscores[row];
  for (bool mean : {false, true}) {
    for (const bool* mask :
         {static_cast<const bool*>(nullptr), static_cast<const bool*>(s.mask.get())}) {
      const Scores want = naive_scores(s, rewards, ends, mean);
      Array<float> scores = unwritten(s.count());
      Array<int32_t> counts(s.count(), -1);
      const bool* marked = mask ? ends.get() : inside.get();
      segment_scores_fwd(rewards, marked, mask, s.rows, mean, scores.get(), counts.get(), kThreads);
      check_close("scores", scores, want.scores);
      check(std::equal(want.counts.begin(), want.counts.end(), counts.get()), "counts");
      Array<float> drewards = unwritten(s.tokens());
      segment_scores_bwd(static_cast<const float*>(dscores.data()), counts.get(), marked, mask,
                         s.rows, mean, drewards.get(), kThreads);
      check_close("drewards", drewards, naive_score_gradient(s, ends, dwant, mean));
    }
  }
}

void test_bradley_terry(const Stream& s, DType dtype, Random& random) {
  if (s.count() == 0 || s.count() % 2) return;
  const auto pairs = static_cast<size_t>(s.count() / 2);
  const Stored rewards = s.random_values(dtype, random);
  const Array<bool> ends = random_ends(s, random);
  Array<float> margin(s.count() / 2);
  for (size_t i = 0; i < pairs; ++i) margin[i] = static_cast<float>(uniform(random));
  const BradleyTerryOptions options{true, 0.1, 0.01};
  for (const float* margins :
       {static_cast<const float*>(nullptr), static_cast<const float*>(margin.get())}) {
    const std::vector<double> e = naive_scores(s, rewards, ends, options.mean).scores;
    std::vector<double> dscores(e.size());
    double loss = 0;
    double right = 0;
    for (size_t i = 0; i < pairs; ++i) {
      const double d = e[i] - e[i + pairs] - (margins ? margins[i] : 0);
      const double sum = e[i] + e[i + pairs];
      const double p = 1 / (1 + std::exp(-d));
      loss += -(1 - options.smoothing) * std::log(p) - options.smoothing * std::log(1 - p) +
              options.center_coef * sum * sum;
      const double dd = p - (1 - options.smoothing);
      const double pull = 2 * options.center_coef * sum;
      dscores[i] = (dd + pull) / static_cast<double>(pairs);
      dscores[i + pairs] = (pull - dd) / static_cast<double>(pairs);
      right += e[i] > e[i + pairs];
    }
    Array<float> loss_out = unwritten(1), accuracy = unwritten(1);
    Array<float> scores = unwritten(s.count()), score_grads = unwritten(s.count());
    Array<int32_t> counts(s.count(), -1);
    segment_bradley_terry_fwd(rewards, ends.get(), s.mask.get(), s.rows, margins, options,
                              loss_out.get(), scores.get(), accuracy.get(), counts.get(),
                              score_grads.get(), nullptr, kThreads);
    check_close("loss", loss_out, {loss / static_cast<double>(pairs)});
    check_close("accuracy", accuracy, {right / static_cast<double>(pairs)});
    check_close("scores", scores, e);
    check_close("score_grads", score_grads, dscores);
    const Array<float> dloss(1, 2.0f), dout(s.count(), 0.25f);
    for (double& d : dscores) d = 2 * d + 0.25;
    Array<float> drewards = unwritten(s.tokens());
    segment_bradley_terry_bwd(dloss.get(), dout.get(), score_grads.get(), counts.get(), ends.get(),
                              s.mask.get(), s.rows, options.mean, drewards.get(), kThreads);
    check_close("drewards", drewards, naive_score_gradient(s, ends, dscores, options.mean));
  }
}

struct Table {
  const char* name;
  double mean_slope, std_slope, min_std;
  std::vector<double> positions, means, stds;

  double normalized(double reward, double p) const {
    if (positions.empty()) return reward;
    const std::vector<double>& x = positions;
    const size_t last = x.size() - 1;
    const size_t left =
        p <= x[0] || last == 0 ? 0
        : p >= x[last]
            ? last
            : static_cast<size_t>(std::upper_bound(x.begin(), x.end(), p) - x.begin() - 1);
    const size_t right = std::min(left + 1, last);
    const double weight =
        left == right ? 0 : std::clamp((p - x[left]) / (x[right] - x[left]), 0.0, 1.0);
    const double mean = means[left] + weight * (means[right] - means[left]);
    const double std = stds[left] + weight * (stds[right] - stds[left]);
    return (reward - mean - mean_slope * std::log(p)) /
           std::max(std + std_slope * std::log(p), min_std);
  }
};

std::vector<Table> tables() {
  Table full{"64 knots", 0, 0, 0.1, {}, {}, {}};
  for (int i = 1; i <= 64; ++i) {
    full.positions.push_back(i / 64.0);
    full.means.push_back(0.25 * (i % 5));
    full.stds.push_back(1 + 0.125 * (i % 7));
  }
  return {{"none", 0, 0, 0, {}, {}, {}},
          {"line", 0.75, 0.5, 0.25, {1.0}, {0.5}, {2.5}},
          {"two knots", 0, 0, 0.25, {0.25, 0.75}, {0.5, -0.5}, {0.0, 2.0}},
          full};
}

std::vector<double> naive_token_rewards(const Stream& s, const Stored& rewards,
                                        const Array<bool>& ends, const Table& table, Spread spread,
                                        bool mean, double clip) {
  std::vector<double> out = zeros(s.tokens());
  for (const auto& row : s.actions) {
    const auto segments = static_cast<double>(
        std::count_if(row.begin(), row.end(), [&](size_t t) { return ends[t]; }));
    size_t begin = 0;
    double k = 0;
    for (size_t i = 0; i < row.size(); ++i) {
      if (!ends[row[i]]) continue;
      ++k;
      double reward = table.normalized(rewards[row[i]], k / segments);
      if (spread == Spread::even) reward /= static_cast<double>(i + 1 - begin);
      if (mean) reward /= segments;
      reward = std::clamp(reward, -clip, clip);
      for (size_t j = spread == Spread::last ? i : begin; j <= i; ++j) out[row[j]] = reward;
      begin = i + 1;
    }
  }
  return out;
}

void test_location_moments(const Stream& s, DType dtype, Random& random) {
  const Stored rewards = s.random_values(dtype, random);
  const Array<bool> ends = random_ends(s, random);
  for (int64_t bins : {1, 7, 1000}) {
    const auto size = static_cast<size_t>(bins);
    std::vector<double> count = zeros(bins), mean = count, m2 = count;
    const auto each_segment = [&](auto visit) {
      for (const auto& row : s.actions) {
        const auto segments =
            std::count_if(row.begin(), row.end(), [&](size_t t) { return ends[t]; });
        double k = 0;
        for (size_t t : row) {
          if (!ends[t]) continue;
          const double nearest =
              std::nearbyint(++k / static_cast<double>(segments) * static_cast<double>(bins));
          visit(std::max<size_t>(static_cast<size_t>(nearest), 1) - 1, rewards[t]);
        }
      }
    };
    each_segment([&](size_t bin, double reward) {
      ++count[bin];
      mean[bin] += reward;
    });
    for (size_t bin = 0; bin < size; ++bin) mean[bin] /= std::max(count[bin], 1.0);
    each_segment(
        [&](size_t bin, double reward) { m2[bin] += (reward - mean[bin]) * (reward - mean[bin]); });
    std::vector<double> want = count;
    want.insert(want.end(), mean.begin(), mean.end());
    want.insert(want.end(), m2.begin(), m2.end());
    Array<double> moments(3 * bins, -1);
    int64_t not_finite[2] = {-1, -1};
    location_moments(rewards, ends.get(), s.mask.get(), s.rows, bins, moments.get(), not_finite,
                     nullptr, kThreads);
    check(not_finite[0] == 0 && not_finite[1] == 0,
          "location_moments: rewards that are not finite");
    check_close("location_moments", moments, want, 1, size);
  }
}

struct Advantages {
  std::vector<double> advantages, returns;
};

Advantages naive_gae(const Stream& s, const std::vector<double>& rewards, const Stored& values,
                     double gamma, double lam) {
  Advantages out{zeros(s.tokens()), zeros(s.tokens())};
  for (const auto& row : s.actions) {
    double next_value = 0;
    double next = 0;
    for (size_t i = row.size(); i-- > 0;) {
      const size_t t = row[i];
      next = rewards[t] + gamma * next_value - values[t] + gamma * lam * next;
      next_value = values[t];
      out.advantages[t] = next;
      out.returns[t] = next + values[t];
    }
  }
  return out;
}

void test_rewards_and_advantages(const Stream& s, DType dtype, Random& random) {
  const Stored rewards = s.random_values(dtype, random);
  const Stored values = s.random_values(dtype, random);
  const Stored logprobs = s.random_values(dtype, random);
  const Stored ref_logprobs = s.random_values(dtype, random);
  const Array<bool> ends = random_ends(s, random);
  const double gamma = 0.99, lam = 0.95, kl_coef = 0.05;
  const Gae gae{gamma, gamma * lam};

  std::vector<double> dense = zeros(s.tokens());
  std::vector<double> kl_want = zeros(s.tokens());
  for (const auto& row : s.actions) {
    for (size_t t : row) {
      dense[t] = rewards[t];
      kl_want[t] = logprobs[t] - ref_logprobs[t];
    }
  }
  const Advantages plain = naive_gae(s, dense, values, gamma, lam);
  Array<float> advantages = unwritten(s.tokens()), returns = unwritten(s.tokens());
  gae_fwd(rewards, values, s.mask.get(), s.rows, gae, advantages.get(), returns.get(), kThreads);
  check_close("gae: advantages", advantages, plain.advantages);
  check_close("gae: returns", returns, plain.returns);

  const std::string stream = where;
  int choice = 0;
  for (const Table& table : tables()) {
    const auto spread = static_cast<Spread>(choice % 3);
    const bool mean = choice++ % 2;
    const double clip = table.positions.empty() ? INFINITY : 0.75;
    where = stream + ", normaliser " + table.name;
    const auto n_knots = static_cast<int64_t>(table.positions.size());
    Array<float> packed(4 + 3 * n_knots);
    const double head[] = {table.mean_slope, table.std_slope, table.min_std,
                           static_cast<double>(n_knots)};
    float* number = std::copy(std::begin(head), std::end(head), packed.get());
    for (const auto* heights : {&table.positions, &table.means, &table.stds}) {
      number = std::copy(heights->begin(), heights->end(), number);
    }
    const Credit credit{{packed.get()}, spread, mean, static_cast<float>(clip)};
    const std::vector<double> want =
        naive_token_rewards(s, rewards, ends, table, spread, mean, clip);
    Array<float> token_rewards = unwritten(s.tokens());
    scatter_segment_rewards_fwd(rewards, ends.get(), s.mask.get(), s.rows, credit,
                                token_rewards.get(), kThreads);
    check_close("token rewards", token_rewards, want);

    std::vector<double> penalised = want;
    for (size_t t = 0; t < want.size(); ++t) penalised[t] -= kl_coef * kl_want[t];
    const Advantages full = naive_gae(s, penalised, values, gamma, lam);
    token_rewards = unwritten(s.tokens());
    Array<float> kl = unwritten(s.tokens());
    const AdvantageInputs in{rewards, logprobs, ref_logprobs, values, s.mask.get(),
                             s.rows,  credit,   kl_coef,      gae};
    const AdvantageOutputs out{advantages.get(), returns.get(), token_rewards.get(), kl.get()};
    segment_advantages_fwd(in, ends.get(), out, kThreads);
    check_close("advantages", advantages, full.advantages);
    check_close("returns", returns, full.returns);
    check_close("token_rewards", token_rewards, want);
    check_close("kl", kl, kl_want);

    // Ends and advantages at once are what they are one after the other, to the bit.
    const Stored entropy = s.random_values(dtype, random);
    const Boundaries boundaries{0.5f, choice % 2 == 0, nullptr, mean};
    Array<bool> found(s.tokens(), true), found_alone(s.tokens(), true);
    segment_ends(entropy, s.mask.get(), s.rows, boundaries, found_alone.get(), kThreads);
    segment_advantages_fwd(in, found_alone.get(), out, kThreads);
    Array<float> at_once[] = {unwritten(s.tokens()), unwritten(s.tokens()), unwritten(s.tokens()),
                              unwritten(s.tokens())};
    const int64_t nan = segment_ends_and_advantages_fwd(
        entropy, boundaries, in, found.get(),
        {at_once[0].get(), at_once[1].get(), at_once[2].get(), at_once[3].get()}, kThreads);
    check(nan == -1, "ends and advantages: a NaN where there is none");
    const auto same = [](const auto& a, const auto& b) {
      return std::memcmp(a.get(), b.get(), a.size() * sizeof *a.get()) == 0;
    };
    check(same(found, found_alone), "ends and advantages: ends");
    const Array<float>* alone[] = {&advantages, &returns, &token_rewards, &kl};
    for (int i = 0; i < 4; ++i) check(same(at_once[i], *alone[i]), "ends and advantages");
  }
}

void test_whiten(const Stream& s, DType dtype, Random& random) {
  const Stored x = s.random_values(dtype, random, 3);
  double count = 0, sum = 0, m2 = 0;
  for (const auto& row : s.actions) {
    for (size_t t : row) {
      ++count;
      sum += x[t];
    }
  }
  const double mean = count ? sum / count : 0;
  for (const auto& row : s.actions) {
    for (size_t t : row) m2 += (x[t] - mean) * (x[t] - mean);
  }
  Array<double> moments(3, -1);
  moments_fwd(x, s.mask.get(), s.tokens(), moments.get(), nullptr, kThreads);
  check(moments[0] == count, "moments: count");
  check_close("moments", moments, {count, mean, m2}, std::fabs(mean));
  for (bool center : {false, true}) {
    std::vector<double> want = zeros(s.tokens());
    const double variance = std::max(count ? m2 / count : 0, 1e-8);
    for (const auto& row : s.actions) {
      for (size_t t : row) want[t] = (x[t] - mean) / std::sqrt(variance) + (center ? 0 : mean);
    }
    Array<float> white = unwritten(s.tokens());
    whiten_fwd(x, s.mask.get(), s.tokens(), moments.get(), center, white.get(), kThreads);
    check_close("whiten", white, want);
  }
}

// What the backward passes of losses are given.
constexpr float kUpstream = 0.5f;

struct Loss {
  double loss;
  double largest;  // term: what rounding errors of the sum are measured by
  std::vector<double> grads;
};

// term_and_grad(t) of every action token, aggregated.
template <class Term>
Loss naive_loss(const Stream& s, Aggregation aggregation, Term term_and_grad) {
  double tokens = 0, seqs = 0;
  for (const auto& row : s.actions) {
    tokens += static_cast<double>(row.size());
    seqs += !row.empty();
  }
  Loss out{0, 0, zeros(s.tokens())};
  for (const auto& row : s.actions) {
    const double weight = aggregation == Aggregation::token_mean ? 1 / tokens
                          : aggregation == Aggregation::seq_mean_token_mean
                              ? 1 / (seqs * static_cast<double>(row.size()))
                              : 1 / seqs;
    for (size_t t : row) {
      const auto [term, grad] = term_and_grad(t);
      out.loss += weight * term;
      out.largest += weight * std::fabs(term);
      out.grads[t] = kUpstream * weight * grad;
    }
  }
  return out;
}

void test_policy_loss(const Stream& s, DType dtype, Random& random) {
  const Stored logprobs = s.random_values(dtype, random);
  const Stored old = s.random_values(dtype, random);
  const Stored advantages = s.random_values(dtype, random);
  const Stored ref = s.random_values(dtype, random);
  const Stored entropy = s.random_values(dtype, random);
  const Array<float> dloss(1, kUpstream);
  const double clip = 0.2;
  const Floats none{nullptr, dtype};
  double tokens = 0, clipped = 0, squares = 0;
  for (const auto& row : s.actions) {
    for (size_t t : row) {
      const double log_ratio = logprobs[t] - old[t];
      ++tokens;
      clipped += advantages[t] > 0 ? std::exp(log_ratio) > 1 + clip
                                   : advantages[t] < 0 && std::exp(log_ratio) < 1 - clip;
      squares += log_ratio * log_ratio;
    }
  }
  int form = 0;
  for (Aggregation aggregation : {Aggregation::token_mean, Aggregation::seq_mean_token_mean,
                                  Aggregation::seq_mean_token_sum}) {
    const bool with_kl = form != 0;
    const bool with_entropy = form++ != 1;
    const PolicyTerm term{static_cast<float>(std::log1p(-clip)),
                          static_cast<float>(std::log1p(clip)), with_kl ? 0.3 : 0,
                          with_entropy ? 0.05 : 0};
    const Loss want = naive_loss(s, aggregation, [&](size_t t) {
      const double rho = std::exp(logprobs[t] - old[t]);
      const double plain = rho * advantages[t];
      const double held = std::clamp(rho, 1 - clip, 1 + clip) * advantages[t];
      const double q = logprobs[t] - ref[t];
      return std::pair{-std::min(plain, held) + term.kl_coef * (std::expm1(-q) + q) -
                           term.entropy_coef * entropy[t],
                       (plain <= held ? -plain : 0.0) - term.kl_coef * std::expm1(-q)};
    });
    const Loss of_entropy =
        naive_loss(s, aggregation, [&](size_t) { return std::pair{0.0, -term.entropy_coef}; });
    Array<float> loss = unwritten(1), clip_fraction = unwritten(1), approx_kl = unwritten(1);
    Array<float> dlogprobs = unwritten(s.tokens()), dentropy = unwritten(s.tokens());
    Array<double> weights(s.count(), -1);
    const Floats refs = with_kl ? Floats(ref) : none;
    policy_loss_fwd(logprobs, old, advantages, refs, with_entropy ? Floats(entropy) : none,
                    s.mask.get(), s.rows, term, aggregation,
                    {loss.get(), clip_fraction.get(), approx_kl.get()}, weights.get(), nullptr,
                    kThreads);
    check_close("policy_loss", loss, {want.loss}, want.largest);
    const double n = std::max(tokens, 1.0);
    check_close("clip_fraction", clip_fraction, {clipped / n});
    check_close("approx_kl", approx_kl, {0.5 * squares / n});
    policy_loss_bwd(dloss.get(), logprobs, old, advantages, refs, s.mask.get(), s.rows, term,
                    weights.get(), dlogprobs.get(), with_entropy ? dentropy.get() : nullptr,
                    kThreads);
    check_close("dlogprobs", dlogprobs, want.grads);
    if (with_entropy) check_close("dentropy", dentropy, of_entropy.grads);
  }
}

void test_value_loss(const Stream& s, DType dtype, Random& random) {
  const Stored fresh = s.random_values(dtype, random);
  const Stored old = s.random_values(dtype, random);
  const Stored target = s.random_values(dtype, random);
  const Array<float> dloss(1, kUpstream);
  const double clip = 0.2;
  for (Aggregation aggregation : {Aggregation::token_mean, Aggregation::seq_mean_token_mean,
                                  Aggregation::seq_mean_token_sum}) {
    Array<float> loss = unwritten(1), grads = unwritten(s.tokens());
    Array<double> weights(s.count(), -1);
    const Loss value = naive_loss(s, aggregation, [&](size_t t) {
      const double plain = fresh[t] - target[t];
      const double limited = std::clamp(fresh[t], old[t] - clip, old[t] + clip);
      const double clipped = limited - target[t];
      const bool counts = std::fabs(plain) >= std::fabs(clipped);
      const double error = counts ? plain : clipped;
      return std::pair{0.5 * error * error, counts || limited == fresh[t] ? plain : 0.0};
    });
    value_loss_fwd(fresh, old, target, s.mask.get(), s.rows, static_cast<float>(clip), aggregation,
                   loss.get(), weights.get(), nullptr, kThreads);
    check_close("value_loss", loss, {value.loss}, value.largest);
    value_loss_bwd(dloss.get(), fresh, old, target, s.mask.get(), s.rows, static_cast<float>(clip),
                   weights.get(), grads.get(), kThreads);
    check_close("dvalues", grads, value.grads);
  }
}

// Rows of logits as a view may give them: `outer` groups of `inner` rows, with elements between
// the rows and between the groups that may not be read.
struct Logits {
  int64_t outer, inner, vocab, row_gap, group_gap;
  bool broadcast;  // every row is the same memory

  int64_t count() const { return outer * inner; }
  int64_t inner_stride() const { return broadcast ? 0 : vocab + row_gap; }
  int64_t outer_stride() const { return broadcast ? 0 : inner * (vocab + row_gap) + group_gap; }
  size_t start(int64_t row) const {
    return static_cast<size_t>(row / inner * outer_stride() + row % inner * inner_stride());
  }
  size_t extent() const { return count() ? start(count() - 1) + static_cast<size_t>(vocab) : 0; }
};

std::vector<double> random_row(int64_t vocab, int kind, Random& random) {
  std::vector<double> z(static_cast<size_t>(vocab));
  for (double& x : z) x = 3 * normal(random);
  const auto at = [&] { return static_cast<size_t>(random() % static_cast<uint64_t>(vocab)); };
  switch (kind) {
    case 1:  // banned tokens, and one that is not
      for (double& x : z) x = uniform(random) < 0.5 ? -INFINITY : x;
      z[at()] = 1;
      break;
    case 2:
      std::fill(z.begin(), z.end(), -1000.0);
      break;
    case 3:
      z[at()] = 30000;
      break;
    case 4:
      std::fill(z.begin(), z.end(), -INFINITY);
      break;
    case 5:
      z[at()] = NAN;
      break;
    case 6:
      z[at()] = INFINITY;
      break;
    default:
      break;
  }
  return z;
}

// Rows of logits with what an op takes beside them; masked rows hold nothing that may be read.
struct VocabCase {
  // Rows are kept with probability `kept`; without a mask, all are.
  VocabCase(const Logits& shape_, DType dtype, double kept, Random& random)
      : shape(shape_),
        masked(kept < 1),
        mask(shape_.count(), true),
        targets(shape_.count()),
        temperatures(shape_.count()),
        dlogprobs(shape_.count()),
        dentropy(shape_.count()),
        logits(dtype, fill(kept, random)) {
    rows = {logits.data(),
            dtype,
            shape.count(),
            shape.vocab,
            shape.inner,
            shape.outer_stride(),
            shape.inner_stride(),
            0,
            targets.get(),
            masked ? temperatures.get() : nullptr,
            0.75};
  }

  double temperature(size_t row) const { return masked ? temperatures[row] : rows.temperature; }
  const bool* mask_or_null() const { return masked ? mask.get() : nullptr; }

  Logits shape;
  bool masked;
  Array<bool> mask;
  Array<int64_t> targets;
  Array<float> temperatures, dlogprobs, dentropy;
  Stored logits;
  VocabRows rows;

 private:
  std::vector<double> fill(double kept, Random& random) {
    std::vector<double> values(shape.extent(), NAN);
    for (int64_t row = 0; row < shape.count(); ++row) {
      const auto r = static_cast<size_t>(row);
      dlogprobs[r] = row % 4 == 3 ? 0.0f : static_cast<float>(normal(random));
      dentropy[r] = row % 3 == 0 ? 0.0f : static_cast<float>(normal(random));
      mask[r] = uniform(random) < kept;
      temperatures[r] = mask[r] ? static_cast<float>(0.5 + uniform(random)) : NAN;
      targets[r] = !mask[r] ? -7
                   : row % 5 == 4
                       ? -100
                       : static_cast<int64_t>(random() % static_cast<uint64_t>(shape.vocab));
      if (!mask[r] && !shape.broadcast) continue;
      const auto z =
          random_row(shape.vocab, shape.broadcast ? 0 : static_cast<int>(row % 7), random);
      std::copy(z.begin(), z.end(), values.begin() + static_cast<std::ptrdiff_t>(shape.start(row)));
    }
    return values;
  }
};

struct VocabStats {
  std::vector<double> logprobs, entropy, dlogits;
};

VocabStats naive_vocab(const VocabCase& c) {
  const auto vocab = static_cast<size_t>(c.shape.vocab);
  VocabStats out{zeros(c.shape.count()), zeros(c.shape.count()),
                 zeros(c.shape.count() * c.shape.vocab)};
  std::vector<double> z(vocab), e(vocab);
  for (size_t r = 0; r < c.mask.size(); ++r) {
    if (!c.mask[r]) continue;
    const double t = c.temperature(r);
    for (size_t v = 0; v < vocab; ++v) {
      z[v] = c.logits[c.shape.start(static_cast<int64_t>(r)) + v] / t;
    }
    const double row_max = *std::max_element(z.begin(), z.end());
    double sum_exp = 0, sum_exp_shift = 0;
    for (size_t v = 0; v < vocab; ++v) {
      e[v] = std::exp(z[v] - row_max);
      sum_exp += e[v];
      if (z[v] != -INFINITY) sum_exp_shift += e[v] * (z[v] - row_max);
    }
    const double entropy = std::log(sum_exp) - sum_exp_shift / sum_exp;
    out.entropy[r] = entropy;
    const bool has_target = c.targets[r] >= 0;
    const auto target = static_cast<size_t>(has_target ? c.targets[r] : 0);
    if (has_target)
      out.logprobs[r] = std::isnan(sum_exp) ? NAN : z[target] - row_max - std::log(sum_exp);
    const double dlogprob = has_target ? c.dlogprobs[r] : 0;
    if (dlogprob == 0 && c.dentropy[r] == 0) continue;
    for (size_t v = 0; v < vocab; ++v) {
      const double p = e[v] / sum_exp;
      const double of_entropy = p > 0 ? -p * (z[v] - row_max - std::log(sum_exp) + entropy) : p;
      const double one = has_target && v == target;
      out.dlogits[r * vocab + v] = (dlogprob * (one - p) + c.dentropy[r] * of_entropy) / t;
    }
  }
  return out;
}

void test_vocab(const VocabCase& c, Random& random) {
  const int64_t count = c.shape.count();
  const auto vocab = static_cast<size_t>(c.shape.vocab);
  const VocabStats want = naive_vocab(c);
  Array<float> logprobs = unwritten(count), entropy = unwritten(count);
  Array<RowStats> stats(count, RowStats{1, 1, 1}), sliced_stats = stats;
  const auto check_forward = [&](const std::string& form) {
    check_close(form + ": logprobs", logprobs, want.logprobs, 1, 1);
    check_close(form + ": entropy", entropy, want.entropy, 1, 1);
  };
  vocab_forward(c.rows, c.mask_or_null(), logprobs.get(), entropy.get(), stats.get(), kThreads);
  check_forward("vocab_forward");

  Array<RowState> states(count);
  for (int64_t first = 0; first < c.shape.vocab;) {
    VocabRows slice = c.rows;
    const int64_t most = std::min(c.shape.vocab - first, 1 + c.shape.vocab / 2);
    slice.vocab = 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(most));
    slice.first = first;
    slice.logits = static_cast<const char*>(c.rows.logits) + first * element_size(c.rows.dtype);
    vocab_accumulate(slice, c.mask_or_null(), states.get(), kThreads);
    first += slice.vocab;
  }
  vocab_finish(c.rows, c.mask_or_null(), states.get(), logprobs.get(), entropy.get(),
               sliced_stats.get(), kThreads);
  check_forward("vocab_accumulate");

  VocabRows no_targets = c.rows;
  no_targets.targets = nullptr;
  vocab_forward(no_targets, c.mask_or_null(), nullptr, entropy.get(), sliced_stats.get(), kThreads);
  check_close("entropy alone", entropy, want.entropy, 1, 1);

  Stored dlogits(c.rows.dtype, std::vector<double>(want.dlogits.size(), 12345.0));
  const int64_t stride = c.shape.vocab;
  vocab_backward(no_targets, stats.get(), nullptr, nullptr, dlogits.data(), stride, kThreads);
  check_close("dlogits of nothing", dlogits, zeros(count * c.shape.vocab));
  vocab_backward(c.rows, stats.get(), c.dlogprobs.get(), c.dentropy.get(), dlogits.data(), stride,
                 kThreads);
  check_close("dlogits", dlogits, want.dlogits, 0.1, vocab, epsilon(c.rows.dtype));

  const int64_t gap = 3;
  const std::vector<double> filler(static_cast<size_t>(count * (stride + gap)), 4096.0);
  Stored apart(c.rows.dtype, filler);
  const Stored untouched(c.rows.dtype, filler);
  vocab_backward(c.rows, stats.get(), c.dlogprobs.get(), c.dentropy.get(), apart.data(),
                 stride + gap, kThreads);
  const int64_t width = element_size(c.rows.dtype);
  for (int64_t row = 0; row < count; ++row) {
    const auto* start = static_cast<const char*>(apart.data()) + row * (stride + gap) * width;
    const auto* together = static_cast<const char*>(dlogits.data()) + row * stride * width;
    check(std::memcmp(start, together, static_cast<size_t>(stride * width)) == 0,
          "dlogits of rows that are apart");
    check(std::memcmp(start + stride * width, untouched.data(), static_cast<size_t>(gap * width)) ==
              0,
          "dlogits: written between the rows");
  }
  if (c.shape.broadcast || c.shape.row_gap || c.shape.group_gap) return;
  vocab_backward(c.rows, stats.get(), c.dlogprobs.get(), c.dentropy.get(),
                 const_cast<void*>(c.rows.logits), stride, kThreads);
  check_close("dlogits in place", c.logits, want.dlogits, 0.1, vocab, epsilon(c.rows.dtype));
}

void test_vocab_everywhere() {
  const Logits all[] = {
      {0, 1, 5, 0, 0, false},     {1, 1, 1, 0, 0, false},     {1, 9, 1, 0, 0, false},
      {1, 9, 3, 0, 0, false},     {2, 7, 15, 0, 15, false},   {2, 7, 16, 1, 0, false},
      {3, 5, 17, 3, 20, false},   {1, 8, 65, 0, 0, false},    {1, 9, 511, 0, 0, false},
      {1, 9, 1025, 7, 0, false},  {1, 9, 2047, 0, 0, false},  {2, 8, 2049, 0, 2049, false},
      {1, 20, 5003, 0, 0, false}, {1, 3, 33000, 0, 0, false}, {1, 20, 5003, 0, 0, true}};
  for (const Logits& shape : all) {
    for (DType dtype : kDTypes) {
      for (double kept : {1.0, 0.6}) {
        where = "vocab " + std::to_string(shape.count()) + " x " + std::to_string(shape.vocab) +
                ", dtype " + std::to_string(static_cast<int>(dtype)) + (kept < 1 ? ", masked" : "");
        Random random(static_cast<uint64_t>(shape.vocab));
        test_vocab(VocabCase(shape, dtype, kept, random), random);
      }
    }
  }
}

// A gradient so large that it is written past the caches.
void test_vocab_streamed() {
  for (DType dtype : kDTypes) {
    where = "vocab streamed, dtype " + std::to_string(static_cast<int>(dtype));
    const int64_t vocab = 16387;
    // The last row has a gradient, and nothing may be touched behind it.
    const int64_t count = 2 + SEGK_STREAMED / (vocab * element_size(dtype));
    Random random(7);
    test_vocab(VocabCase({1, count, vocab, 0, 0, false}, dtype, 1, random), random);
  }
}

void test_vocab_exp() {
  where = "vocab_exp";
  for (int64_t n : {0, 1, 3, 7, 8, 15, 16, 17, 1000}) {
    Array<float> x(n), out = unwritten(n);
    std::vector<double> want;
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = -80.0f * static_cast<float>(i) / static_cast<float>(n);
      want.push_back(1);
    }
    vocab_exp(x.get(), out.get(), n);
    for (size_t i = 0; i < x.size(); ++i) out[i] /= static_cast<float>(std::exp(double{x[i]}));
    check_close("exp over its value", out, want);
  }
}

void test_expm1_double() {
  where = "expm1_double";
  for (int i = -5000; i < 5000; ++i) {
    for (const double x : {0.1416 * i, 1e-3 * i, 1e-7 * i}) {
      const double want = std::expm1(x);
      check(std::fabs(expm1_double(x) - want) <= 1e-10 * std::fabs(want), "within its error");
    }
  }
  const double inf = std::numeric_limits<double>::infinity();
  check(expm1_double(-inf) == -1, "below");
  for (const double x : {710.0, inf}) check(expm1_double(x) == inf, "above");
  check(std::isnan(expm1_double(std::numeric_limits<double>::quiet_NaN())), "NaN stays");
}

void test_exp_double() {
  where = "exp_double";
  for (int i = -5000; i < 5000; ++i) {
    const double x = 0.1416 * i;  // to +-708
    const double want = std::exp(x);
    check(std::fabs(exp_double(x) - want) <= 2e-11 * want, "within its error");
  }
  const double inf = std::numeric_limits<double>::infinity();
  for (const double x : {-inf, -1e4}) check(static_cast<float>(exp_double(x)) == 0, "below");
  for (const double x : {inf, 1e4}) check(exp_double(x) > 8e307, "above");
  check(std::isnan(exp_double(std::numeric_limits<double>::quiet_NaN())), "NaN stays");
  check(exp_double(0) == 1, "of 0");
}

void test_log_float() {
  where = "log_float";
  const auto test = [](float x) {
    const double want = std::log(static_cast<double>(x));
    const double ulp = want == 0 ? 0 : std::ldexp(1.0, std::ilogb(want) - 23);
    check(std::fabs(log_float(x) - want) <= ulp, "within 1 ulp");
  };
  for (int i = -870; i < 880; ++i) test(std::exp(0.1f * static_cast<float>(i)));
  for (int n = 1; n < 200; ++n) {  // what positions are
    for (int k = 1; k <= n; ++k) test(static_cast<float>(k) / static_cast<float>(n));
  }
}

void test_everything() {
  for_each_stream(test_segment_ends);
  for_each_stream(test_segment_ends_nan);
  for_each_stream(test_segment_scores);
  for_each_stream(test_bradley_terry);
  for_each_stream(test_rewards_and_advantages);
  for_each_stream(test_location_moments);
  for_each_stream(test_whiten);
  for_each_stream(test_policy_loss);
  for_each_stream(test_value_loss);
  test_vocab_everywhere();
  test_vocab_exp();
  test_exp_double();
  test_expm1_double();
  test_log_float();
}

// One op that keeps the pool busy for a while, and what it gives.
class PooledOp {
 public:
  PooledOp()
      : random_(1),
        stream_(stream_of(std::vector<int64_t>(64, 16384), false, Keep::holes, random_)),
        x_(stream_.random_values(DType::f32, random_)),
        want_(output()) {
    run(1, want_);
  }

  Array<float> output() const { return unwritten(2 * stream_.tokens()); }

  // Allocates nothing of its own: a forked child may find the sanitizer's allocator locked.
  bool same(Executor threads, const Array<float>& out) const {
    run(threads, out);
    return std::equal(out.get(), out.get() + out.size(), want_.get());
  }

 private:
  void run(Executor threads, const Array<float>& out) const {
    gae_fwd(x_, x_, stream_.mask.get(), stream_.rows, {0.99, 0.99 * 0.95}, out.get(),
            out.get() + stream_.tokens(), threads);
  }

  Random random_;
  Stream stream_;
  Stored x_;
  Array<float> want_;
};

void test_pool_sizes(const PooledOp& op) {
  where = "changing numbers of threads";
  const Array<float> out = op.output();
  for (Executor threads : {2, 5, 1, 3, 64, 0, 2}) check(op.same(threads, out), "gae");
}

void test_several_callers() {
  std::vector<std::thread> callers;
  for (Memory kind : {Memory::heap, Memory::guarded}) {
    callers.emplace_back([kind] {
      memory = kind;
      test_everything();
    });
  }
  for (std::thread& caller : callers) caller.join();
}

#if !defined(__SANITIZE_THREAD__)  // it cannot follow threads that a forked child starts
// A child that is forked while other threads are in the pool has none of its threads.
void test_fork(const PooledOp& op) {
  where = "fork";
  std::atomic<bool> stop{false};
  std::vector<std::thread> busy;
  for (int i = 0; i < 2; ++i) {
    busy.emplace_back([&] {
      const Array<float> out = op.output();
      while (!stop) check(op.same(3, out), "gae beside fork");
    });
  }
  const Array<float> out = op.output();
  for (int i = 0; i < 8; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);
      _exit(op.same(3, out) && op.same(4, out) ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "gae in a forked child");
  }
  stop = true;
  for (std::thread& one : busy) one.join();
}
#endif

int run() {
  test_everything();
  test_several_callers();
  memory = Memory::guarded;
  test_vocab_streamed();
  const PooledOp op;
  test_pool_sizes(op);
#if !defined(__SANITIZE_THREAD__)
  test_fork(op);
#endif
  std::printf("%s: %d failures\n", isa_name(), failures.load());
  return failures == 0 ? 0 : 1;
}

}  // namespace

int main() {
  setenv("SEGKERNELS_ISA", isa_name(), 1);
  try {
    chosen_isa();
  } catch (const std::invalid_argument& error) {
    std::printf("%s: not run here: %s\n", isa_name(), error.what());
    return 0;
  }
  return run();
}
