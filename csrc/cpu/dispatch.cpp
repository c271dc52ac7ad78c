// The thread pool, and the choice of an instruction set at run time.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace segk {
namespace {

struct Job {
  const std::function<void(int64_t, int64_t)>* body = nullptr;
  int64_t count = 0;
  int64_t chunk = 0;
  std::atomic<int64_t> next{0};

  void work() {
    for (;;) {
      const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
      if (begin >= count) return;
      (*body)(begin, std::min(begin + chunk, count));
    }
  }
};

class Pool {
 public:
  // One job at a time; false when another caller holds the pool.
  bool try_run(Job& job, int threads) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    const int helpers = threads - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < helpers) {
        const int index = static_cast<int>(workers_.size());
        workers_.emplace_back([this, index] { loop(index); });
      }
      job_ = &job;
      wanted_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    job.work();
    // Every piece is taken: who has not woken up by now is not waited for.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  void loop(int index) {
    uint64_t seen = 0;
    for (;;) {
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (index >= wanted_ || !job_) continue;
        job = job_;
        ++running_;
      }
      job->work();
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (--running_ == 0) done_.notify_one();
      }
    }
  }

  std::mutex busy_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int wanted_ = 0;
  int running_ = 0;  // workers that joined the job
  uint64_t generation_ = 0;
};

// The pool is never destroyed: its threads sleep until the process ends. A forked child has none
// of them, so it starts with a new pool and leaves the parent's memory alone.
std::atomic<Pool*> current_pool{nullptr};

Pool& pool() {
  static const int registered = pthread_atfork(
      nullptr, nullptr, [] { current_pool.store(nullptr, std::memory_order_relaxed); });
  (void)registered;
  Pool* existing = current_pool.load(std::memory_order_acquire);
  if (existing) return *existing;
  Pool* fresh = new Pool;
  if (current_pool.compare_exchange_strong(existing, fresh)) return *fresh;
  delete fresh;
  return *existing;
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int64_t threads,
                  const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t pieces = (count + grain - 1) / grain;
  const int used = static_cast<int>(std::min(std::max<int64_t>(threads, 1), pieces));
  if (used > 1) {
    Job job;
    job.body = &body;
    job.count = count;
    // Four chunks a thread: rows are ragged, so equal counts are not equal work.
    const int64_t chunks = std::min<int64_t>(pieces, int64_t{4} * used);
    job.chunk = (pieces + chunks - 1) / chunks * grain;
    if (pool().try_run(job, used)) return;
  }
  body(0, count);
}

}  // namespace segk
