#include "emulate.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

// Saves the callee-saved registers on the current stack, stores its top in *from and continues at `to`.
extern "C" void emulate_switch(void** from, void* to);
asm(R"(
.text
.globl emulate_switch
emulate_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emulate {

alignas(1024) uint8_t shared_memory[kSharedBytes];
Thread* current = nullptr;

namespace {

constexpr size_t kStackBytes = 256 * 1024;

struct Meeting {  // of a collective
  std::vector<void*> arguments;
  int arrived = 0;
  uint64_t generation = 0;
};
struct Barrier {
  uint32_t expected = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
};
struct Batch {  // copies of one thread that arrive together
  int left = 0;
  uint32_t barrier = 0;
  bool closed = false;
};
struct Fiber : Thread {
  std::unique_ptr<char[]> stack;
  void* top = nullptr;
  bool done = false;
  const uint64_t* watched = nullptr;  // runnable once *watched differs from `seen` in the bits of `mask`
  uint64_t seen = 0, mask = ~0ull;
  std::vector<std::pair<uint32_t, const void*>> open_copies;
  std::shared_ptr<Batch> batch;  // its own copies since it last asked for an arrival
  uint64_t own_copies = 0;       // under way
  std::deque<std::vector<std::pair<uint32_t, const void*>>> committed_copies;
};
struct Warpgroup {
  std::deque<std::vector<std::vector<Product>>> committed;
  std::vector<std::vector<Product>> open;
};

std::vector<std::unique_ptr<Fiber>> fibers;
void* scheduler_top;
const std::function<void()>* body;
std::map<std::pair<int, int>, Meeting> meetings;  // (threads, index of the group)
std::map<uint32_t, Barrier> barriers;
std::map<int, Warpgroup> warpgroups;
int block_threads;

struct Copy {
  uint32_t destination;
  const void* source;  // of a thread's own copy perhaps null: zeros
  uint32_t bytes, barrier;
  int owner = 0;  // the thread, + 1, as whose write it counts; 0: a bulk copy
  std::shared_ptr<Batch> batch;
};
std::vector<Copy> copies;      // under way
int unfenced[kSharedBytes / 2];  // by 16-bit word: the thread that wrote it without a fence since, + 1

// Whether and how the schedule is random: PT_EMULATED_SEED, read at every launch. From launch to launch it goes on, until there is another seed.
uint32_t current_seed = 0;
std::mt19937 generator;
uint32_t seed() { return current_seed; }
void read_seed() {
  const char* given = getenv("PT_EMULATED_SEED");
  const uint32_t now = given ? (uint32_t)atoi(given) : 0;
  if (now != current_seed) generator.seed(now);
  current_seed = now;
}
uint32_t random_below(uint32_t bound) { return generator() % bound; }

Fiber& self() { return *static_cast<Fiber*>(current); }

void yield_until_changed(const uint64_t* watched, uint64_t seen, uint64_t mask) {
  Fiber& me = self();
  me.watched = watched, me.seen = seen, me.mask = mask;
  emulate_switch(&me.top, scheduler_top);
}

void entry() {
  (*body)();
  Fiber& me = self();
  me.done = true;
  emulate_switch(&me.top, scheduler_top);
  abort();
}

void meet(Meeting& meeting, int size, int index, void* argument, void (*together)(void**, int)) {
  meeting.arguments.resize(size);
  meeting.arguments[index] = argument;
  if (++meeting.arrived == size) {
    together(meeting.arguments.data(), size);
    meeting.arrived = 0;
    meeting.generation++;
  } else {
    yield_until_changed(&meeting.generation, meeting.generation, ~0ull);
  }
}

void complete_if_ready(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.pending = barrier.expected, barrier.phase++;
}

Barrier& barrier_at(uint32_t address) {
  auto found = barriers.find(address);
  if (found == barriers.end()) fail("thread %d uses a barrier at %u that was never initialised", current->index(), address);
  return found->second;
}

void execute(const std::vector<Product>& products) {
  const int n = products[0].n;
  const uint32_t start = (uint32_t)(products[0].b & 0x3fff) << 4, k_stride = (uint32_t)(products[0].b >> 16 & 0x3fff) << 4,
                 n_stride = (uint32_t)(products[0].b >> 32 & 0x3fff) << 4;
  const bool transposed = products[0].transposed, half = products[0].half;
  std::vector<float> b(16 * n), a(64 * 16);
  for (int k = 0; k < 16; k++)
    for (int j = 0; j < n; j++) {
      const uint32_t at = start + k / 8 * k_stride + j / 8 * n_stride + (transposed ? k % 8 * 16 + j % 8 * 2 : j % 8 * 16 + k % 8 * 2);
      if (unfenced[at / 2]) fail("wgmma reads shared memory at %u, which thread %d wrote without a proxy fence", at, unfenced[at / 2] - 1);
      b[k * n + j] = to_float(*(const uint16_t*)shared_at(at, 2), half);
    }
  for (int t = 0; t < 128; t++)
    for (int r = 0; r < 4; r++)
      for (int e = 0; e < 2; e++)
        a[(t / 32 * 16 + t % 32 / 4 + r % 2 * 8) * 16 + t % 4 * 2 + e + r / 2 * 8] = to_float((uint16_t)(products[t].a[r] >> 16 * e), half);
  for (int t = 0; t < 128; t++)
    for (int i = 0; i < n / 2; i++) {
      const int row = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; k++) sum += a[row * 16 + k] * b[k * n + column];
      products[t].c[i] = products[t].accumulate ? products[t].c[i] + sum : sum;
    }
}

void land_own(const Copy& copy) {
  if (copy.source) memcpy(shared_memory + copy.destination, copy.source, copy.bytes);
  else memset(shared_memory + copy.destination, 0, copy.bytes);
  for (uint32_t word = copy.destination / 2; word < (copy.destination + copy.bytes) / 2; word++) unfenced[word] = copy.owner;
  if (!copy.batch) return;  // it arrived at once
  fibers[copy.owner - 1]->own_copies--;
  if (--copy.batch->left == 0 && copy.batch->closed) barrier_arrive(copy.batch->barrier);
}

void land(const Copy& copy) {
  if (copy.owner) return land_own(copy);
  for (uint32_t word = copy.destination / 2; word < (copy.destination + copy.bytes) / 2; word++)
    if (unfenced[word]) fail("a copy overwrites shared memory at %u, which thread %d wrote without a proxy fence", word * 2, unfenced[word] - 1);
  memcpy(shared_memory + copy.destination, copy.source, copy.bytes);
  Barrier& barrier = barrier_at(copy.barrier);
  barrier.bytes -= copy.bytes;
  complete_if_ready(barrier);
}

// Some of the copies under way arrive; true if any did.
bool land_some() {
  bool any = false;
  for (size_t i = 0; i < copies.size();) {
    if (random_below(4) != 0) {
      i++;
      continue;
    }
    const Copy copy = copies[i];
    copies.erase(copies.begin() + i);
    land(copy);
    any = true;
  }
  return any;
}

bool runnable(const Fiber& f) { return !f.done && !(f.watched && (*f.watched & f.mask) == (f.seen & f.mask)); }

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "emulation: ");
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  va_end(arguments);
  abort();
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  read_seed();
  block_threads = (int)(block.x * block.y * block.z);
  if (shared_bytes > kSharedBytes || block_threads > 1024 || block_threads < 1 || grid.y > 65535 || grid.z > 65535)
    fail("launch of %d threads, grid (%u, %u, %u), %zu bytes of shared memory", block_threads, grid.x, grid.y, grid.z, shared_bytes);
  body = &kernel;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        memset(shared_memory, 0xff, sizeof shared_memory);
        meetings.clear(), barriers.clear(), warpgroups.clear();
        memset(unfenced, 0, sizeof unfenced);
        while ((int)fibers.size() < block_threads) {
          fibers.push_back(std::make_unique<Fiber>());
          fibers.back()->stack.reset(new char[kStackBytes]);
        }
        for (int t = 0; t < block_threads; t++) {
          Fiber& f = *fibers[t];
          f.thread = {t % block.x, t / block.x % block.y, t / (block.x * block.y)};
          f.block = {x, y, z}, f.block_dim = block, f.grid_dim = grid, f.done = false, f.watched = nullptr;
          f.open_copies.clear(), f.committed_copies.clear(), f.batch.reset();
          void** top = (void**)(((uintptr_t)f.stack.get() + kStackBytes) & ~(uintptr_t)15) - 1;  // as after a call
          *--top = (void*)entry;
          for (int r = 0; r < 6; r++) *--top = nullptr;
          f.top = top;
        }
        const int warps = (block_threads + 31) / 32;
        std::vector<int> order(warps), pace(warps, 4);  // of 4: how often a warp gets its turn
        for (int w = 0; w < warps; w++) {
          order[w] = w;
          if (seed()) pace[w] = 1 + (int)random_below(4);
        }
        for (int left = block_threads; left > 0;) {
          bool progress = land_some(), later = !copies.empty();
          for (int w = 0; seed() && w < warps; w++) std::swap(order[w], order[random_below(warps)]);
          for (int w : order) {
            const bool turn = !seed() || (int)random_below(4) < pace[w];
            for (int t = w * 32; t < std::min(w * 32 + 32, block_threads); t++) {
              Fiber& f = *fibers[t];
              if (!runnable(f)) continue;
              if (!turn) {
                later = true;
                continue;
              }
              f.watched = nullptr;
              current = &f;
              emulate_switch(&scheduler_top, f.top);
              progress = true;
              left -= f.done;
            }
          }
          if (!progress && !later) fail("deadlock in block (%u, %u, %u): %d threads wait for ever", x, y, z, left);
        }
        if (!copies.empty()) fail("%zu copies under way at the end", copies.size());
        for (auto& [index, group] : warpgroups)
          if (!group.open.empty() || !group.committed.empty()) fail("warpgroup %d ended with products in flight", index);
      }
}

void collective(int threads, void* argument, void (*together)(void**, int)) {
  const int size = threads ? threads : block_threads, index = current->index();
  meet(meetings[{threads, index / size}], size < block_threads ? size : block_threads, index % size, argument, together);
}

void barrier_init(uint32_t address, uint32_t arrivals) {
  Barrier& b = barriers[address];
  b = Barrier{};
  b.expected = b.pending = arrivals;
}
void barrier_arrive(uint32_t address) {
  Barrier& b = barrier_at(address);
  if (b.pending-- == 0) fail("too many arrivals at the barrier at %u", address);
  complete_if_ready(b);
}
void barrier_expect(uint32_t address, uint32_t bytes) {
  barrier_at(address).bytes += bytes;
  barrier_arrive(address);
}
void barrier_wait(uint32_t address, uint32_t parity) {
  Barrier& b = barrier_at(address);
  if ((b.phase & 1) == parity) yield_until_changed(&b.phase, b.phase, 1);
}
void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
  if (destination % 16 || (uintptr_t)source % 16 || bytes % 16 || destination + bytes > kSharedBytes)
    fail("bulk copy of %u bytes from %p to %u", bytes, source, destination);
  const Copy copy = {destination, source, bytes, barrier};
  if (!seed()) return land(copy);
  memset(shared_memory + destination, 0xff, bytes);
  copies.push_back(copy);
}

void copy_own(uint32_t destination, const void* source, uint32_t bytes, bool exists) {
  if (destination % bytes || (uintptr_t)source % bytes || destination + bytes > kSharedBytes) fail("a copy of %u bytes from %p to %u", bytes, source, destination);
  Copy copy = {destination, exists ? source : nullptr, bytes, 0, current->index() + 1, nullptr};
  if (!seed()) return land_own(copy);
  std::shared_ptr<Batch>& batch = self().batch;
  if (!batch) batch = std::make_shared<Batch>();
  batch->left++, copy.batch = batch, self().own_copies++;
  memset(shared_memory + destination, 0xff, bytes);
  copies.push_back(copy);
}
void wait_for_own_copies() {
  while (self().own_copies) yield_until_changed(&self().own_copies, self().own_copies, ~0ull);
}
void arrive_after_copies(uint32_t barrier) {
  const std::shared_ptr<Batch> batch = std::move(self().batch);
  if (!batch || batch->left == 0) return barrier_arrive(barrier);
  batch->barrier = barrier, batch->closed = true;
}

void written(uint32_t address, uint32_t bytes) {
  for (uint32_t word = address / 2; word < (address + bytes) / 2; word++) unfenced[word] = current->index() + 1;
}
void fence_async() {
  const int me = current->index() + 1;
  for (int& thread : unfenced)
    if (thread == me) thread = 0;
}

void wgmma(const Product& product) {
  Product mine = product;
  collective(128, &mine, [](void** arguments, int) {
    std::vector<Product> all;
    for (int t = 0; t < 128; t++) all.push_back(*(Product*)arguments[t]);
    for (const Product& p : all)
      if (p.b != all[0].b || p.n != all[0].n || p.accumulate != all[0].accumulate) fail("threads of a warpgroup disagree about a wgmma");
    warpgroups[current->index() / 128].open.push_back(std::move(all));
  });
}
void wgmma_commit() {
  collective(128, nullptr, [](void**, int) {
    Warpgroup& group = warpgroups[current->index() / 128];
    group.committed.push_back(std::move(group.open));
    group.open.clear();
  });
}
void wgmma_wait(int pending) {
  static int allowed;
  allowed = pending;
  collective(128, nullptr, [](void**, int) {
    Warpgroup& group = warpgroups[current->index() / 128];
    while ((int)group.committed.size() > allowed) {
      for (const auto& products : group.committed.front()) execute(products);
      group.committed.pop_front();
    }
  });
}

void copy(uint32_t destination, const void* source) {
  static const char* when = getenv("PT_EMULATED_COPIES");
  if (when && !strcmp(when, "late"))
    self().open_copies.push_back({destination, source});
  else
    memcpy(shared_at(destination, 16), source, 16);
}
void copy_commit() {
  self().committed_copies.push_back(std::move(self().open_copies));
  self().open_copies.clear();
}
void copy_wait(int pending) {
  auto& groups = self().committed_copies;
  while ((int)groups.size() > pending) {
    for (const auto& [destination, source] : groups.front()) memcpy(shared_at(destination, 16), source, 16);
    groups.pop_front();
  }
}

void load_matrices(uint32_t* registers, int count, uint32_t address, bool transposed) {
  struct Slot {
    uint32_t* registers;
    uint32_t address;
    int count;
    bool transposed;
  } slot{registers, address, count, transposed};
  collective(32, &slot, [](void** arguments, int) {
    const Slot& first = *(Slot*)arguments[0];
    for (int matrix = 0; matrix < first.count; matrix++) {
      uint16_t values[8][8];
      for (int row = 0; row < 8; row++) {
        const uint32_t from = ((Slot*)arguments[matrix * 8 + row])->address;
        memcpy(values[row], shared_at(from, 16), 16);
      }
      for (int lane = 0; lane < 32; lane++) {
        const int major = lane / 4, minor = lane % 4 * 2;
        const uint16_t low = first.transposed ? values[minor][major] : values[major][minor];
        const uint16_t high = first.transposed ? values[minor + 1][major] : values[major][minor + 1];
        ((Slot*)arguments[lane])->registers[matrix] = (uint32_t)high << 16 | low;
      }
    }
  });
}

void mma_m16n8k16(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, bool half) {
  struct Slot {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
    bool half;
  } slot{c, a, {b0, b1}, half};
  collective(32, &slot, [](void** arguments, int) {
    float A[16][16], B[16][8];
    const bool half = ((Slot*)arguments[0])->half;
    for (int lane = 0; lane < 32; lane++) {
      const Slot& s = *(Slot*)arguments[lane];
      for (int r = 0; r < 4; r++)
        for (int e = 0; e < 2; e++) A[lane / 4 + r % 2 * 8][lane % 4 * 2 + e + r / 2 * 8] = to_float((uint16_t)(s.a[r] >> 16 * e), half);
      for (int r = 0; r < 2; r++)
        for (int e = 0; e < 2; e++) B[lane % 4 * 2 + e + r * 8][lane / 4] = to_float((uint16_t)(s.b[r] >> 16 * e), half);
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += A[lane / 4 + i / 2 * 8][k] * B[k][lane % 4 * 2 + i % 2];
        ((Slot*)arguments[lane])->c[i] += sum;
      }
  });
}

}  // namespace emulate

// The little of the CUDA runtime that the library calls. PT_EMULATED_MULTIPROCESSORS makes persistent grids and time segments small or large.
extern "C" {
// Each number of them is a device of its own, since the library keeps what it has read of one.
cudaError_t cudaGetDevice(int* device) {
  const char* multiprocessors = getenv("PT_EMULATED_MULTIPROCESSORS");
  *device = multiprocessors ? atoi(multiprocessors) : 6;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (attribute == cudaDevAttrMultiProcessorCount)
    *value = device;
  else if (attribute == cudaDevAttrComputeCapabilityMajor)
    *value = 9;
  else
    *value = 0;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  return cudaSuccess;
}
// Tells powertrain/native/binding.py that this library computes on CPU tensors.
int pt_emulated(void) { return 1; }
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  memset(at, value, bytes);
  return cudaSuccess;
}
}
