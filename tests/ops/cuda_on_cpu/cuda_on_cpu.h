// Enough of CUDA to run the kernels of ops/csrc/cuda on a CPU: one block after the other, one warp after the other, the
// 32 lanes of a warp as fibers that take turns at every shuffle and __syncwarp. It shows what the kernels compute, that
// no lane misses a collective, and that nothing depends on the order of lanes; not what a GPU's memory model would
// allow. __CUDA_ARCH__ is defined by the command line. Atomic additions are counted as the memory sees them.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  unsigned x, y, z;
};
inline Index threadIdx, blockIdx, gridDim;

namespace emulation {

constexpr int kLanes = 32;
inline bool backwards = false;  // the order in which lanes take their turns

// Atomic additions: instructions of warps, the cache lines (128 bytes) and the sectors (32 bytes) that they touch. The
// n-th addition of every lane belongs to one instruction, which holds where no lane skips one.
struct Traffic {
  int64_t instructions, lines, sectors;
};
inline Traffic traffic;
inline uint64_t first_sum;  // on a GPU, memory begins where a line does

struct Warp {
  ucontext_t scheduler, lanes[kLanes];
  std::vector<char> stacks = std::vector<char>(kLanes * size_t(256) << 10);
  std::function<void()> body;
  unsigned first_thread = 0;
  int current = 0, rounds[kLanes] = {};
  bool done[kLanes] = {};
  std::vector<uint64_t> added[kLanes];  // the sectors of each addition, one after the other
  uint64_t given[2][kLanes];  // of this collective and of the last, which slower lanes may still be reading

  static Warp& instance() {
    static Warp warp;
    return warp;
  }
  static void enter() {
    Warp& w = instance();
    w.body();
    w.done[w.current] = true;
    swapcontext(&w.lanes[w.current], &w.scheduler);
  }
  void run(unsigned first) {
    first_thread = first;
    for (int i = 0; i < kLanes; ++i) {
      done[i] = false;
      rounds[i] = 0;
      added[i].clear();
      getcontext(&lanes[i]);
      lanes[i].uc_stack.ss_sp = stacks.data() + i * (size_t(256) << 10);
      lanes[i].uc_stack.ss_size = size_t(256) << 10;
      lanes[i].uc_link = &scheduler;
      makecontext(&lanes[i], enter, 0);
    }
    while (!done[0]) {
      for (int i = 0; i < kLanes; ++i) {
        current = backwards ? kLanes - 1 - i : i;
        threadIdx.x = first_thread + current;
        swapcontext(&scheduler, &lanes[current]);
      }
      for (int i = 1; i < kLanes; ++i) {
        if (done[i] == done[0] && rounds[i] == rounds[0]) continue;
        std::fprintf(stderr, "lane %d left the others at a collective\n", i);
        std::abort();
      }
    }
    count_additions();
  }
  void count_additions() const {
    for (size_t n = 0;; ++n) {
      std::set<uint64_t> lines, sectors;
      for (const std::vector<uint64_t>& of_lane : added) {
        if (n >= of_lane.size()) continue;
        sectors.insert(of_lane[n]);
        lines.insert(of_lane[n] / 4);
      }
      if (sectors.empty()) return;
      ++traffic.instructions;
      traffic.lines += static_cast<int64_t>(lines.size());
      traffic.sectors += static_cast<int64_t>(sectors.size());
    }
  }
  // Gives `bits` and waits until every lane has. What they gave is in given[result].
  int meet(uint64_t bits) {
    const int me = current, slot = rounds[me] % 2;
    given[slot][me] = bits;
    ++rounds[me];
    swapcontext(&lanes[me], &scheduler);
    return slot;
  }
};

inline std::vector<uint64_t> shared;  // of a block; begins as rubbish

template <class F>
void launch(const Index& blocks, int threads, size_t shared_bytes, const F& kernel) {
  gridDim = blocks;
  Warp& warp = Warp::instance();
  warp.body = kernel;
  const int64_t count = int64_t(blocks.x) * blocks.y * blocks.z;
  for (int64_t block = 0; block < count; ++block) {
    blockIdx.x = static_cast<unsigned>(block % blocks.x);
    blockIdx.y = static_cast<unsigned>(block / blocks.x % blocks.y);
    blockIdx.z = static_cast<unsigned>(block / blocks.x / blocks.y);
    shared.assign(shared_bytes / sizeof(uint64_t) + 1, 0x7ff8dead7fc0beefu);
    for (int first = 0; first < threads; first += kLanes) warp.run(first);
  }
}

}  // namespace emulation

// What the lane `of(me)` gave.
template <class T, class F>
T exchange(T x, const F& of) {
  emulation::Warp& warp = emulation::Warp::instance();
  const int me = warp.current;
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  const int slot = warp.meet(bits);
  std::memcpy(&x, &warp.given[slot][of(me)], sizeof(T));
  return x;
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int distance) {
  return exchange(x, [&](int me) { return me ^ distance; });
}
template <class T>
T __shfl_sync(unsigned, T x, int lane, int width) {
  return exchange(x, [&](int me) { return me / width * width + (lane & (width - 1)); });
}
inline unsigned __ballot_sync(unsigned, bool x) {
  emulation::Warp& warp = emulation::Warp::instance();
  const int slot = warp.meet(x);
  unsigned bits = 0;
  for (int lane = 0; lane < emulation::kLanes; ++lane) bits |= unsigned(warp.given[slot][lane]) << lane;
  return bits;
}
inline void __syncwarp() { emulation::Warp::instance().meet(0); }

inline unsigned long long atomicMax(unsigned long long* to, unsigned long long x) { return *to = std::max(*to, x); }
inline long long __double2ll_rn(double x) { return std::llrint(x); }
inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
using std::exp;
using std::floor;
using std::fmax;
using std::isfinite;
using std::max;
using std::memcpy;
using std::min;

// Stored in two bytes, as bfloat16 and float16 are; bfloat16 is the upper half of a float.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 x;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return {uint16_t(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) { return static_cast<float>(x.x); }
inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }

namespace dino_d2::cuda {

inline uint64_t address_of(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }
inline uint64_t kept_address_of(const void* pointer) { return address_of(pointer); }
template <int SIZE>
uint64_t address_of(uint64_t first, uint32_t index) {
  return first + uint64_t(index) * SIZE;
}
inline int lowest_bit(unsigned x) { return __builtin_ffs(static_cast<int>(x)) - 1; }
template <class A>
A reciprocal(A x) {
  return 1 / x;
}
template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::shared.data());
}
template <class T>
T read_at(uint64_t address) {
  if (address % alignof(T) != 0) {
    std::fprintf(stderr, "a read of %zu bytes is not aligned\n", sizeof(T));
    std::abort();
  }
  return *reinterpret_cast<const T*>(address);
}
// `address` is a multiple of the size of what is added, which therefore lies in one sector.
inline void record_addition(uint64_t address, size_t size) {
  if (address % size != 0) {
    std::fprintf(stderr, "an addition to %zu bytes is not aligned\n", size);
    std::abort();
  }
  emulation::Warp& warp = emulation::Warp::instance();
  warp.added[warp.current].push_back((address - emulation::first_sum) / 32);
}
template <class T>
void add_at(uint64_t address, T x) {
  record_addition(address, sizeof(T));
  *reinterpret_cast<T*>(address) += x;
}
inline void add_at(uint64_t address, float x, float y, float z, float w) {
  record_addition(address, 4 * sizeof(float));
  float* const to = reinterpret_cast<float*>(address);
  to[0] += x;
  to[1] += y;
  to[2] += z;
  to[3] += w;
}

}  // namespace dino_d2::cuda
