// The public functions of the three stages: validation, choice of architecture, errors, sizes, the registry of kernels.
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "segments.h"
#include "stages.h"

namespace powertrain {
namespace {

constexpr int kMostDevices = 64;
thread_local char last_error[512] = "";

std::vector<KernelEntry>& registry() {
  static std::vector<KernelEntry> entries;
  return entries;
}

struct DeviceFacts {
  int multiprocessors, major;
};
// Read once per device; two threads that race write the same values.
int device_facts(DeviceFacts* facts) {
  static std::atomic<int> known[kMostDevices];  // multiprocessors << 8 | major; 0: not read yet
  int device = 0;
  if (int status = check_cuda(cudaGetDevice(&device), "cudaGetDevice")) return status;
  int packed = device < kMostDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (!packed) {
    int count = 0, major = 0;
    if (int status = check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute")) return status;
    if (int status = check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute")) return status;
    packed = count << 8 | major;
    if (device < kMostDevices) known[device].store(packed, std::memory_order_relaxed);
  }
  *facts = {packed >> 8, packed & 0xff};
  return PT_OK;
}

}  // namespace

int validate(const pt_problem* p) {
  if (!p) return fail(PT_INVALID, "problem is null");
  if (p->dtype != PT_BF16 && p->dtype != PT_FP16) return fail(PT_UNSUPPORTED, "dtype %d: bf16 (0) and fp16 (1) are supported", p->dtype);
  if (p->head_dim != 32 && p->head_dim != 64 && p->head_dim != 128)
    return fail(PT_UNSUPPORTED, "head_dim %d: 32, 64 and 128 are supported", p->head_dim);
  if (p->batch < 1 || p->key_heads < 1 || p->query_heads < 1 || p->query_heads % p->key_heads)
    return fail(PT_INVALID, "batch %d, query_heads %d, key_heads %d: all positive, query_heads a multiple of key_heads", p->batch, p->query_heads,
                p->key_heads);
  if ((int64_t)p->batch * p->query_heads > 65535)
    return fail(PT_UNSUPPORTED, "batch * query_heads = %lld: at most 65535", (long long)p->batch * p->query_heads);
  if (p->seq_len < 1 || p->seq_len > (int64_t)1 << 36) return fail(PT_INVALID, "seq_len %lld: 1 to 2^36", (long long)p->seq_len);
  if (p->chunk_size < kBlock || p->chunk_size % kBlock) return fail(PT_INVALID, "chunk_size %d: a positive multiple of %d", p->chunk_size, kBlock);
  if (!(p->state_scale > 0)) return fail(PT_INVALID, "state_scale %g: a positive power of two", p->state_scale);
  return PT_OK;
}

namespace {

// PT_ARCH_AUTO resolved for this device and stage.
int select(const pt_problem& p, int stage, int* arch) {
  if (p.arch == PT_ARCH_SM80) {
    *arch = PT_ARCH_SM80;
  } else {
    DeviceFacts facts;
    if (int status = device_facts(&facts)) return status;
    const bool hopper = facts.major == 9 && sm90::supports(p, stage);
    if (p.arch == PT_ARCH_SM90 && !hopper) return fail(PT_UNSUPPORTED, "arch 90 was forced on compute capability %d.x or for a configuration without it", facts.major);
    *arch = hopper ? PT_ARCH_SM90 : PT_ARCH_SM80;
  }
  if (*arch == PT_ARCH_SM80 && !sm80::supports(p, stage)) return fail(PT_UNSUPPORTED, "stage %d: not compiled for head_dim %d, dtype %d", stage, p.head_dim, p.dtype);
  return PT_OK;
}

#define PT_REQUIRE(condition) \
  if (!(condition)) return fail(PT_INVALID, "%s: %s does not hold", __func__, #condition)
#define PT_TRY(call) \
  if (int status = (call)) return status

}  // namespace

int fail(pt_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

int check_cuda(cudaError_t error, const char* what) {
  return error == cudaSuccess ? PT_OK : fail(PT_CUDA_ERROR, "%s: %s", what, cudaGetErrorString(error));
}

int multiprocessors() {
  DeviceFacts facts;
  return device_facts(&facts) == PT_OK ? facts.multiprocessors : 1;
}

// Code from compute_80, for other GPUs (and for these if CUDA_FORCE_PTX_JIT is set: not supported), does not wait (follow_earlier_kernels).
bool starts_early() {
  DeviceFacts facts;
  return device_facts(&facts) == PT_OK && facts.major == 9;
}

int allow_shared_memory(const void* kernel, int bytes) {
  int device = 0;
  PT_TRY(check_cuda(cudaGetDevice(&device), "cudaGetDevice"));
  // A kernel's bit d says that device d has its limit raised; entries never go away.
  struct Slot {
    std::atomic<const void*> kernel;
    std::atomic<uint64_t> devices;
  };
  static Slot slots[256];
  Slot* slot = nullptr;
  for (auto& candidate : slots) {
    const void* expected = nullptr;
    if (candidate.kernel.load() == kernel || candidate.kernel.compare_exchange_strong(expected, kernel) || expected == kernel) {
      slot = &candidate;
      break;
    }
  }
  if (slot && device < 64 && slot->devices.load() >> device & 1) return PT_OK;
  PT_TRY(check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute"));
  if (slot && device < 64) slot->devices.fetch_or(uint64_t(1) << device);
  return PT_OK;
}

bool packs_on_the_way(const pt_problem& problem, bool reverse, bool has_final_state, std::initializer_list<pt_tensor> tensors) {
  for (const pt_tensor& x : tensors)
    if (!vectorizable(x)) return false;
  return !reverse || sm90::has_segments(problem, has_final_state);
}

RegisterKernel::RegisterKernel(const KernelEntry& entry) { registry().push_back(entry); }

}  // namespace powertrain

using namespace powertrain;

extern "C" {

int pt_abi_version(void) { return PT_ABI_VERSION; }
const char* pt_last_error(void) { return last_error; }

int pt_selected_arch(const pt_problem* problem, int32_t stage, int32_t* arch) {
  PT_TRY(validate(problem));
  PT_REQUIRE(arch && stage >= PT_STAGE_CHUNK_STATE && stage <= PT_STAGE_CHUNK_SCAN_GRAD);
  return select(*problem, stage, arch);
}

int pt_compiled_archs(int32_t* archs, int32_t capacity, int32_t* count) {
  PT_REQUIRE(archs && count && capacity >= 2);
  archs[0] = PT_ARCH_SM80, archs[1] = PT_ARCH_SM90;
  *count = 2;
  return PT_OK;
}

int pt_sizes_of(const pt_problem* problem, pt_sizes* sizes) {
  PT_TRY(validate(problem));
  PT_REQUIRE(sizes);
  const pt_problem& p = *problem;
  const int64_t blocks = padded_blocks(p.seq_len), heads = (int64_t)p.batch * p.key_heads, query_heads = (int64_t)p.batch * p.query_heads;
  memset(sizes, 0, sizeof *sizes);
  sizes->packed_q = query_heads * blocks * feature_block_elements(p.head_dim) * 2;
  sizes->packed_k = heads * blocks * feature_block_elements(p.head_dim) * 2;
  sizes->packed_v = heads * blocks * value_block_elements(p.head_dim) * 2;
  sizes->packed_dn = query_heads * blocks * value_block_elements(p.head_dim) * 2;
  sizes->gates = gates_of(p, nullptr).bytes;
  sizes->states = heads * chunks(p.seq_len, p.chunk_size) * phi_tiles(p.head_dim) * state_tile_elements(p.head_dim) * 2;
  sizes->boundary = boundary_elements(p) * 4;
  sizes->dots = heads * blocks * kBlock * 4;
  int arch;
  PT_TRY(select(p, PT_STAGE_CHUNK_STATE, &arch));
  sizes->chunk_state_workspace = arch == PT_ARCH_SM90 ? sm90::chunk_state_workspace(p) : sm80::chunk_state_workspace(p);
  sizes->steps_workspace = arch == PT_ARCH_SM90 ? sm90::steps_workspace(p) : 0;
  return PT_OK;
}

int pt_chunk_state(const pt_problem* problem, const pt_chunk_state_params* params, void* stream) {
  PT_TRY(validate(problem));
  PT_REQUIRE(params && params->x && params->u && params->gates && (params->states || params->final_state));
  int arch;
  PT_TRY(select(*problem, PT_STAGE_CHUNK_STATE, &arch));
  return (arch == PT_ARCH_SM90 ? sm90::chunk_state : sm80::chunk_state)(*problem, *params, (cudaStream_t)stream);
}

int pt_chunk_scan(const pt_problem* problem, const pt_chunk_scan_params* params, void* stream) {
  PT_TRY(validate(problem));
  PT_REQUIRE(params && params->q && params->k && params->u && params->gates && params->out.data);
  PT_REQUIRE(params->states || (!params->has_boundary && problem->seq_len <= problem->chunk_size));
  PT_REQUIRE(params->reverse || params->normalizer);
  int arch;
  PT_TRY(select(*problem, PT_STAGE_CHUNK_SCAN, &arch));
  return (arch == PT_ARCH_SM90 ? sm90::chunk_scan : sm80::chunk_scan)(*problem, *params, (cudaStream_t)stream);
}

int pt_chunk_scan_grad(const pt_problem* problem, const pt_chunk_scan_grad_params* params, void* stream) {
  PT_TRY(validate(problem));
  PT_REQUIRE(params && params->q && params->k && params->v && params->dn && params->gates && params->out.data);
  PT_REQUIRE(params->states || (!params->has_boundary && problem->seq_len <= problem->chunk_size));
  int arch;
  PT_TRY(select(*problem, PT_STAGE_CHUNK_SCAN_GRAD, &arch));
  return (arch == PT_ARCH_SM90 ? sm90::chunk_scan_grad : sm80::chunk_scan_grad)(*problem, *params, (cudaStream_t)stream);
}

static int require_steps(const pt_problem& p, const char* stage) {
  pt_sizes sizes;
  PT_TRY(pt_sizes_of(&p, &sizes));
  if (sizes.steps_workspace) return PT_OK;
  return fail(PT_UNSUPPORTED, "%s: on Hopper, head_dim 32 in bf16, chunks of 128, 256, 384 or 512 and more than one of them; head_dim %d, dtype %d, "
              "chunk_size %d, seq_len %lld", stage, p.head_dim, p.dtype, p.chunk_size, (long long)p.seq_len);
}

int pt_query_scan(const pt_problem* problem, const pt_query_scan_params* params, void* stream) {
  PT_TRY(validate(problem));
  PT_REQUIRE(params && params->k && params->v && params->gates && params->workspace);
  PT_REQUIRE(params->out.data ? params->q && params->normalizer && params->states : params->final_state != nullptr);
  PT_TRY(require_steps(*problem, __func__));
  const bool packs = params->unpacked_q.data || params->unpacked_k.data || params->unpacked_v.data;
  PT_REQUIRE(!packs || (params->unpacked_k.data && params->unpacked_v.data));
  PT_REQUIRE(!packs || (params->unpacked_q.data != nullptr) == (params->out.data != nullptr));
  PT_REQUIRE(!packs || packs_on_the_way(*problem, false, params->final_state, {params->unpacked_q, params->unpacked_k, params->unpacked_v}));
  return sm90::query_scan(*problem, *params, (cudaStream_t)stream);
}

int pt_key_grads(const pt_problem* problem, const pt_key_grads_params* params, void* stream) {
  PT_TRY(validate(problem));
  PT_REQUIRE(params && params->q && params->dn && params->gates && params->workspace);
  PT_REQUIRE(params->dk.data || params->dv.data ? params->dk.data && params->dv.data && params->k && params->v : params->final_state != nullptr);
  PT_TRY(require_steps(*problem, __func__));
  const bool packs = params->dy.data || params->y.data || params->normalizer;
  PT_REQUIRE(!packs || (params->dy.data && params->y.data && params->normalizer));
  PT_REQUIRE(!packs || packs_on_the_way(*problem, true, params->final_state, {params->dy, params->y}));
  return sm90::key_grads(*problem, *params, (cudaStream_t)stream);
}

int pt_packs_on_the_way(const pt_problem* problem, int32_t reverse, int32_t has_final_state, const pt_tensor* tensors, int32_t count, int32_t* packs) {
  pt_sizes sizes;
  PT_TRY(pt_sizes_of(problem, &sizes));
  PT_REQUIRE(tensors && packs && count >= 1);
  *packs = sizes.steps_workspace != 0;
  for (int i = 0; i < count; i++) *packs = *packs && packs_on_the_way(*problem, reverse, has_final_state, {tensors[i]});
  return PT_OK;
}

int pt_kernel_count(int32_t* count) {
  PT_REQUIRE(count);
  *count = (int32_t)registry().size();
  return PT_OK;
}

int pt_kernel_info(int32_t index, pt_kernel_attributes* attributes) {
  PT_REQUIRE(attributes && index >= 0 && index < (int32_t)registry().size());
  const KernelEntry& entry = registry()[index];
  cudaFuncAttributes facts;
  PT_TRY(check_cuda(cudaFuncGetAttributes(&facts, entry.function), entry.name));
  memset(attributes, 0, sizeof *attributes);
  snprintf(attributes->name, sizeof attributes->name, "%s", entry.name);
  attributes->arch = entry.arch;
  attributes->registers = facts.numRegs;
  attributes->local_bytes = (int32_t)facts.localSizeBytes;
  attributes->shared_bytes = (int32_t)facts.sharedSizeBytes + entry.dynamic_shared_bytes;
  attributes->threads = entry.threads;
  return PT_OK;
}

}  // extern "C"
