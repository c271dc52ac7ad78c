// As much of CUDA as the kernels of csrc/cuda use, on the CPU: the very .cu files compile with a
// C++ compiler and this folder in front of the include path. The threads of a block are fibers that
// take turns at barriers and shuffles; the blocks of a cooperative launch are threads of the
// system, so that they can wait for each other. A barrier that some thread never reaches is an
// error, and order() changes whose turn comes first, so that what depends on it can be found.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
// One copy for each system thread, so for each block of a cooperative launch.
#define __shared__ static thread_local

struct dim3 {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};

namespace cuda_on_host {

constexpr int kLanes = 32;

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Thread {
  dim3 index;
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf at;
  bool started = false;
  bool done = true;
  const Barrier* waits_for = nullptr;
  unsigned generation = 0;
  unsigned shuffles = 0;
};

struct Warp {
  Barrier barrier;
  uint32_t words[2][kLanes];  // of this shuffle and the one before, which some lanes still read
};

// Where the blocks of a cooperative launch wait for each other.
class Grid {
 public:
  explicit Grid(int blocks) : blocks_(blocks) {}

  // False when another block has failed.
  bool wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned generation = generation_;
    if (++arrived_ == blocks_) {
      arrived_ = 0;
      ++generation_;
      all_here_.notify_all();
    }
    all_here_.wait(lock, [&] { return failed_ || generation_ != generation; });
    return !failed_;
  }
  void fail() {
    std::lock_guard<std::mutex> lock(mutex_);
    failed_ = true;
    all_here_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  int blocks_;
  int arrived_ = 0;
  unsigned generation_ = 0;
  bool failed_ = false;
};

inline std::atomic<unsigned> turns{0};
inline std::atomic<unsigned> launched{0};

// Who goes first: 0 the first thread, 1 the last, another number a random order drawn from it.
inline void order(unsigned seed) { turns = seed; }

class Block;
inline thread_local Block* running = nullptr;

class Block {
 public:
  void run(dim3 grid_dim, dim3 block_dim, unsigned index, Grid* together,
           const std::function<void()>& kernel) {
    grid = grid_dim;
    dim = block_dim;
    this->index = dim3(index);
    together_ = together;
    kernel_ = &kernel;
    if (dim.x % kLanes != 0 || dim.x > 1024) throw std::runtime_error("a block of part of a warp");
    while (threads_.size() < dim.x) threads_.push_back(std::make_unique<Thread>());
    warps_.assign(dim.x / kLanes, Warp{});
    barrier_ = Barrier{};
    for (unsigned i = 0; i < dim.x; ++i) begin(*threads_[i], i);
    running = this;
    take_turns(in_order());
    running = nullptr;
  }

  Thread& current() { return *current_; }

  void wait_for(Barrier& barrier, int expected) {
    current_->waits_for = &barrier;
    current_->generation = barrier.generation;
    if (++barrier.arrived == expected) {
      barrier.arrived = 0;
      ++barrier.generation;
    }
    while (waits(*current_)) pause();
    current_->waits_for = nullptr;
  }

  void sync() { wait_for(barrier_, static_cast<int>(dim.x)); }

  void sync_grid() {
    sync();
    if (current_->index.x == 0 && !(together_ && together_->wait())) {
      const Barrier never;
      wait_for(const_cast<Barrier&>(never), 2);
    }
    sync();
  }

  // What the lane `from` of this warp offers; its own word where there is no such lane.
  uint32_t shuffle(uint32_t word, int from) {
    const int lane = static_cast<int>(current_->index.x) % kLanes;
    Warp& warp = warps_[current_->index.x / kLanes];
    uint32_t* words = warp.words[current_->shuffles++ % 2];
    words[lane] = word;
    wait_for(warp.barrier, kLanes);
    return words[from < 0 || from >= kLanes ? lane : from];
  }

  dim3 grid;
  dim3 dim;
  dim3 index;

 private:
  static bool waits(const Thread& thread) {
    return thread.waits_for && thread.waits_for->generation == thread.generation;
  }

  static void enter() {
    for (;;) {
      (*running->kernel_)();
      running->current_->done = true;
      running->pause();
    }
  }

  void begin(Thread& thread, unsigned number) {
    if (!thread.stack) {
      constexpr size_t kStack = 128 * 1024;
      thread.stack.reset(new char[kStack]);
      getcontext(&thread.start);
      thread.start.uc_stack.ss_sp = thread.stack.get();
      thread.start.uc_stack.ss_size = kStack;
      makecontext(&thread.start, enter, 0);
    }
    thread.index = dim3(number);
    thread.done = false;
    thread.waits_for = nullptr;
    thread.shuffles = 0;
  }

  std::vector<unsigned> in_order() const {
    std::vector<unsigned> numbers(dim.x);
    std::iota(numbers.begin(), numbers.end(), 0u);
    const unsigned seed = turns;
    if (seed == 1) std::reverse(numbers.begin(), numbers.end());
    if (seed > 1) std::shuffle(numbers.begin(), numbers.end(), std::mt19937(seed + index.x));
    return numbers;
  }

  void take_turns(const std::vector<unsigned>& numbers) {
    for (;;) {
      bool any_ran = false;
      bool all_done = true;
      for (const unsigned number : numbers) {
        Thread& thread = *threads_[number];
        if (!thread.done && !waits(thread)) {
          any_ran = true;
          resume(thread);
        }
        all_done = all_done && thread.done;
      }
      if (all_done) return;
      if (!any_ran) {
        running = nullptr;
        threads_.clear();  // half way through the kernel, and of no use any more
        throw std::runtime_error("a barrier or shuffle that not every thread reaches");
      }
    }
  }

  // _setjmp, not swapcontext: the latter asks the system for its signal mask every time.
  __attribute__((noinline)) void resume(Thread& thread) {
    current_ = &thread;
    if (_setjmp(turn_taker_) != 0) return;
    if (thread.started) _longjmp(thread.at, 1);
    thread.started = true;
    setcontext(&thread.start);
  }

  __attribute__((noinline)) void pause() {
    if (_setjmp(current_->at) == 0) _longjmp(turn_taker_, 1);
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  Barrier barrier_;
  Grid* together_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  Thread* current_ = nullptr;
  jmp_buf turn_taker_;
};

inline void run_apart(dim3 grid, dim3 dim, const std::function<void()>& kernel) {
  thread_local Block block;
  for (unsigned i = 0; i < grid.x; ++i) block.run(grid, dim, i, nullptr, kernel);
}

inline void run_together(dim3 grid, dim3 dim, const std::function<void()>& kernel) {
  Grid together(static_cast<int>(grid.x));
  std::vector<std::thread> blocks;
  std::string error;
  std::mutex mutex;
  for (unsigned i = 0; i < grid.x; ++i) {
    blocks.emplace_back([&, i] {
      try {
        Block().run(grid, dim, i, &together, kernel);
      } catch (const std::exception& caught) {
        std::lock_guard<std::mutex> lock(mutex);
        error = caught.what();
        together.fail();
      }
    });
  }
  for (std::thread& block : blocks) block.join();
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace cuda_on_host

namespace cuda_on_host {

// threadIdx and its like: who is asked depends on who is running.
template <unsigned (*of_running)()>
struct Index {
  struct {
    operator unsigned() const { return of_running(); }
  } x;
};
inline unsigned thread_index() { return running->current().index.x; }
inline unsigned block_index() { return running->index.x; }
inline unsigned block_dim() { return running->dim.x; }
inline unsigned grid_dim() { return running->grid.x; }

}  // namespace cuda_on_host

constexpr cuda_on_host::Index<cuda_on_host::thread_index> threadIdx{};
constexpr cuda_on_host::Index<cuda_on_host::block_index> blockIdx{};
constexpr cuda_on_host::Index<cuda_on_host::block_dim> blockDim{};
constexpr cuda_on_host::Index<cuda_on_host::grid_dim> gridDim{};

inline void __syncthreads() { cuda_on_host::running->sync(); }

inline uint32_t __shfl_sync(unsigned, uint32_t word, int lane) {
  return cuda_on_host::running->shuffle(word, lane);
}
inline uint32_t __shfl_up_sync(unsigned, uint32_t word, unsigned distance) {
  const int lane = static_cast<int>(threadIdx.x) % cuda_on_host::kLanes;
  return cuda_on_host::running->shuffle(word, lane - static_cast<int>(distance));
}
inline uint32_t __shfl_down_sync(unsigned, uint32_t word, unsigned distance) {
  const int lane = static_cast<int>(threadIdx.x) % cuda_on_host::kLanes;
  return cuda_on_host::running->shuffle(word, lane + static_cast<int>(distance));
}

inline uint32_t __shfl_xor_sync(unsigned, uint32_t word, int lanes) {
  const int lane = static_cast<int>(threadIdx.x) % cuda_on_host::kLanes;
  return cuda_on_host::running->shuffle(word, lane ^ lanes);
}

inline void __syncwarp() { cuda_on_host::running->shuffle(0, 0); }

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

// The part of the runtime that csrc/cuda/launch.cuh uses. Devices have contexts, as far as it
// matters who creates them.

namespace cuda_on_host {

constexpr int kDevices = 4;
inline std::atomic<bool> contexts[kDevices];
inline std::atomic<int> launched_on{-1};  // the device of the last launch
inline thread_local int current_device = 0;

}  // namespace cuda_on_host

#define CUDART_VERSION 13000

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr unsigned long long cudaEnableDefault = 0;

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_host::current_device;
  return cudaSuccess;
}
// Creates a context, as since CUDA 12.
inline cudaError_t cudaSetDevice(int device) {
  cuda_on_host::contexts[device] = true;
  cuda_on_host::current_device = device;
  return cudaSuccess;
}
namespace cuda_on_host {

inline int primary_context_state(int device, unsigned*, int* active) {
  *active = contexts[device];
  return 0;
}

}  // namespace cuda_on_host
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult*) {
  *entry = reinterpret_cast<void*>(&cuda_on_host::primary_context_state);
  return cudaSuccess;
}
// A small device: three blocks at a time.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <class Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args),
                               const Args& args) {
  ++cuda_on_host::launched;
  cuda_on_host::contexts[cuda_on_host::current_device] = true;
  cuda_on_host::launched_on = cuda_on_host::current_device;
  const std::function<void()> body = [=] { kernel(args); };
  if (config->numAttrs > 0) {
    cuda_on_host::run_together(config->gridDim, config->blockDim, body);
  } else {
    cuda_on_host::run_apart(config->gridDim, config->blockDim, body);
  }
  return cudaSuccess;
}
