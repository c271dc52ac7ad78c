#include "cpu/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

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
    const auto helpers = static_cast<size_t>(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_.size() < helpers) workers_.emplace_back([this] { loop(); });
      job_ = &job;
      wanted_ = threads - 1;
    }
    for (size_t i = 0; i < helpers; ++i) wake_.notify_one();
    job.work();
    // A helper that has not come by now is not waited for: it finds no job and sleeps on.
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;
    }
    // Those that did are at their last piece: to sleep and be woken would take longer.
    const auto patience = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    while (running_ > 0 && std::chrono::steady_clock::now() < patience) {
    }
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return job_ && wanted_ > 0; });
      Job* job = job_;
      --wanted_;
      ++running_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int wanted_ = 0;               // helpers that the job still takes
  std::atomic<int> running_{0};  // helpers at work on it; changes under mutex_
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
  const int64_t shares = count / std::max<int64_t>(grain, 1);
  const int used = static_cast<int>(std::min(std::max<int64_t>(threads, 1), shares));
  if (used > 1) {
    Job job;
    job.body = &body;
    job.count = count;
    // Several pieces a thread: rows are ragged, and a helper comes late.
    job.chunk = std::max<int64_t>(1, count / (int64_t{8} * used));
    if (pool().try_run(job, used)) return;
  }
  body(0, count);
}

}  // namespace segk
