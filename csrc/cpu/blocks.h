// Work on rows. Most rows are walked whole, one thread each. A giant row is cut into blocks that
// the threads share; the cuts count marked tokens only, so neither the number of threads nor
// padding nor neighbouring rows change a result.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "cpu/flags.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "segk/executor.h"
#include "segk/rows.h"

namespace segk {

// How many tokens make it worth waking a thread: for an op that takes several nanoseconds a token,
// and for one that takes less than three.
constexpr int64_t kTokensPerTask = 32768;
constexpr int64_t kQuickTokensPerTask = 65536;
constexpr int64_t kBlock = 32768;  // marked tokens in a block of a giant row

// Outputs of at least this many numbers may be memory that the system has yet to hand out.
constexpr int64_t kNewMemory = 262144;

struct Row {
  int64_t index;
  int64_t begin;
  int64_t end;
  const std::vector<int64_t>* cuts;  // begin, where blocks meet, end; null for a row in one piece
  Executor executor;

  // Calls body(block, begin, end) for every block, in any order.
  template <class Body>
  void blocks(const Body& body) const {
    if (!cuts) return body(int64_t{0}, begin, end);
    const auto range = [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        body(block, (*cuts)[block], (*cuts)[block + 1]);
      }
    };
    parallel_for(static_cast<int64_t>(cuts->size()) - 1, 1, executor.threads_or_stream,
                 std::cref(range));
  }
};

namespace detail {

inline bool is_giant(Flags marks, int64_t begin, int64_t end) {
  return end - begin > kBlock && count_true(begin, end, marks) > kBlock;
}

inline void cut(Flags marks, int64_t begin, int64_t end, std::vector<int64_t>& cuts) {
  constexpr int64_t kStride = 1024;
  cuts.assign(1, begin);
  int64_t left = kBlock;
  for (int64_t t = begin; t < end;) {
    const int64_t next = std::min(t + kStride, end);
    const int64_t count = count_true(t, next, marks);
    if (count < left) {
      left -= count;
      t = next;
      continue;
    }
    while (left > 0) left -= marks[t++];
    cuts.push_back(t);
    left = kBlock;
  }
  if (cuts.back() != end) cuts.push_back(end);
}

}  // namespace detail

// Calls body(row) once for each row; a row with many `marks` is giant. `outs` are arrays that body
// writes, whose memory is fetched some rows at a time.
template <class Body, class... Out>
void for_each_row(Rows rows, Flags marks, int64_t tokens_per_task, Executor executor,
                  const Body& body, Out*... outs) {
  const int64_t tokens = std::max<int64_t>(rows.tokens(), 1);
  const int64_t grain = (tokens_per_task * rows.count + tokens - 1) / tokens;
  const bool large = tokens >= kNewMemory;
  const auto range = [&](int64_t first, int64_t last) {
    int64_t fetched = rows.begin(first);
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = rows.begin(i);
      const int64_t end = rows.end(i);
      if (detail::is_giant(marks, begin, end)) continue;
      if (large && end > fetched) {
        const int64_t next = std::min(std::max(end, fetched + kNewMemory / 8), rows.begin(last));
        (fetch_pages(outs + fetched, (next - fetched) * static_cast<int64_t>(sizeof *outs)), ...);
        fetched = next;
      }
      body(Row{i, begin, end, nullptr, executor});
    }
  };
  parallel_for(rows.count, grain, executor.threads_or_stream, std::cref(range));

  std::vector<int64_t> cuts;
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t begin = rows.begin(i);
    const int64_t end = rows.end(i);
    if (!detail::is_giant(marks, begin, end)) continue;
    detail::cut(marks, begin, end, cuts);
    body(Row{i, begin, end, &cuts, executor});
  }
}

// Sums and scans of rows under combine(Summary, Summary), an operator of include/segk.
template <class Summary>
class Scan {
 public:
  explicit Scan(Summary identity) : identity_(identity) {}

  // summarize(begin, end) of all blocks, combined in their order.
  template <class Summarize>
  Summary total(const Row& row, const Summarize& summarize) {
    if (!row.cuts) return summarize(row.begin, row.end);
    summarize_blocks(row, summarize);
    Summary sum = identity_;
    for (const Summary& part : parts_) sum = combine(sum, part);
    return sum;
  }

  // Calls walk(begin, end, before, after) for every block, with the summaries of what its row has
  // around it. A row in one piece is walked without being summarized.
  template <class Summarize, class Walk>
  void walk(const Row& row, const Summarize& summarize, const Walk& walk) {
    if (!row.cuts) return walk(row.begin, row.end, identity_, identity_);
    summarize_blocks(row, summarize);
    before_.resize(parts_.size());
    Summary sum = identity_;
    for (size_t i = 0; i < parts_.size(); ++i) {
      before_[i] = sum;
      sum = combine(sum, parts_[i]);
    }
    sum = identity_;
    for (size_t i = parts_.size(); i-- > 0;) {
      const Summary part = parts_[i];
      parts_[i] = sum;
      sum = combine(part, sum);
    }
    row.blocks([&](int64_t block, int64_t begin, int64_t end) {
      walk(begin, end, before_[block], parts_[block]);
    });
  }

 private:
  template <class Summarize>
  void summarize_blocks(const Row& row, const Summarize& summarize) {
    parts_.resize(row.cuts->size() - 1);
    row.blocks(
        [&](int64_t block, int64_t begin, int64_t end) { parts_[block] = summarize(begin, end); });
  }

  Summary identity_;
  std::vector<Summary> parts_;
  std::vector<Summary> before_;
};

}  // namespace segk
