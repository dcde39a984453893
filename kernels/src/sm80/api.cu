// The sm_80 side of the three stages: which configurations exist, and the choice among them.
#include "chunk_state.cuh"

namespace powertrain::sm80 {

#define PT_FOR_EACH_CONFIGURATION(F) F(32, bf16) F(32, fp16) F(64, bf16) F(64, fp16) F(128, bf16) F(128, fp16)
#define PT_DECLARE(D, name)                                                                        \
  int chunk_state_##D##_##name(const pt_problem&, const pt_chunk_state_params&, cudaStream_t);     \
  int chunk_scan_##D##_##name(const pt_problem&, const pt_chunk_scan_params&, cudaStream_t);       \
  int chunk_scan_grad_##D##_##name(const pt_problem&, const pt_chunk_scan_grad_params&, cudaStream_t);
PT_FOR_EACH_CONFIGURATION(PT_DECLARE)

constexpr int key(int head_dim, int dtype) { return head_dim * 2 + dtype; }
constexpr int bf16 = PT_BF16, fp16 = PT_FP16;

#define PT_CASE(stage, D, name) \
  case key(D, name): return stage##_##D##_##name(p, s, stream);
#define PT_STAGE(stage)                                                                          \
  int stage(const pt_problem& p, const pt_##stage##_params& s, cudaStream_t stream) {            \
    switch (key(p.head_dim, p.dtype)) {                                                          \
      PT_CASE(stage, 32, bf16) PT_CASE(stage, 32, fp16) PT_CASE(stage, 64, bf16)                 \
      PT_CASE(stage, 64, fp16) PT_CASE(stage, 128, bf16) PT_CASE(stage, 128, fp16)               \
    }                                                                                            \
    return fail(PT_UNSUPPORTED, #stage ": head_dim %d, dtype %d", p.head_dim, p.dtype);          \
  }
PT_STAGE(chunk_state)
PT_STAGE(chunk_scan)
PT_STAGE(chunk_scan_grad)

bool supports(const pt_problem&, int) { return true; }  // every configuration that validate() lets through

int64_t chunk_state_workspace(const pt_problem& p) {
  switch (p.head_dim) {
    case 32: return chunk_state_workspace_bytes<32>(p);
    case 64: return chunk_state_workspace_bytes<64>(p);
    default: return chunk_state_workspace_bytes<128>(p);
  }
}

}  // namespace powertrain::sm80
