// pt_forward and pt_backward: the stages in order, in one call or in two, with everything between them carved from one workspace.
#include "segments.h"
#include "stages.h"

namespace powertrain {
namespace {

#define PT_REQUIRE(condition) \
  if (!(condition)) return fail(PT_INVALID, "%s: %s does not hold", __func__, #condition)
#define PT_TRY(call) \
  if (int status = (call)) return status

// Buffers one after another, each aligned to 256 bytes. With base 0 it only measures.
class Arena {
 public:
  explicit Arena(const void* base) : base_((char*)const_cast<void*>(base)) {}
  template <typename T = void>
  T* take(int64_t bytes, bool wanted = true) {
    if (!wanted) return nullptr;
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += ceil_div(bytes, 256) * 256;
    return (T*)at;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// What the forward pass keeps. `scales` comes last, unpadded, so that its offset and the size are plain arithmetic in the shapes.
struct Saved {
  void *q, *k, *v, *gates, *states;
  float *q_scale, *k_scale, *v_scale;  // null in bf16
  int64_t scales, bytes;
  Saved(const pt_problem& p, const pt_sizes& sizes, bool has_initial, const void* base) {
    Arena arena(base);
    q = arena.take(sizes.packed_q), k = arena.take(sizes.packed_k), v = arena.take(sizes.packed_v), gates = arena.take(sizes.gates);
    states = arena.take(sizes.states, has_initial || p.chunk_size < p.seq_len);
    scales = bytes = arena.used();
    q_scale = k_scale = v_scale = nullptr;
    if (p.dtype != PT_FP16) return;
    const int64_t query_heads = (int64_t)p.batch * p.query_heads, key_heads = (int64_t)p.batch * p.key_heads;
    bytes += (query_heads + 2 * key_heads) * 4;
    if (base) q_scale = (float*)((char*)base + scales), k_scale = q_scale + query_heads, v_scale = k_scale + key_heads;
  }
};

struct ForwardBuffers {
  void* decayed_v;
  float *initial, *final_state;
  void* scan_workspace;
  bool steps;  // pt_query_scan in place of the stages
  int64_t bytes;
  ForwardBuffers(const pt_problem& p, const pt_sizes& sizes, int phase, bool has_initial, bool has_final, void* base) {
    Arena arena(base);
    const bool begins = phase != PT_FINISH, finishes = phase != PT_BEGIN;
    const bool states = begins && (has_initial || has_final || p.chunk_size < p.seq_len);
    steps = sizes.steps_workspace && phase == PT_WHOLE;
    decayed_v = arena.take(sizes.packed_v, states && !steps);
    initial = arena.take<float>(sizes.boundary, has_initial && finishes), final_state = arena.take<float>(sizes.boundary, has_final && begins);
    scan_workspace = arena.take(steps ? sizes.steps_workspace : sizes.chunk_state_workspace, states);
    bytes = arena.used();
  }
};

struct BackwardBuffers {
  bool key_grads;  // pt_key_grads in place of the reverse stages
  void *scaled_q, *dn, *decayed_dn, *grad_states, *scan_workspace;
  float *scaled_normalizer, *row_scale, *row_limit, *dn_scale, *leaving, *entering, *dots, *flow;
  int64_t bytes, begun_bytes;
  BackwardBuffers(const pt_problem& p, const pt_sizes& sizes, int phase, bool has_initial, bool has_final, void* base, void* begun) {
    Arena arena(base), apart(begun);
    Arena& kept = phase == PT_WHOLE ? arena : apart;  // what a second call goes on from
    const bool begins = phase != PT_FINISH, finishes = phase != PT_BEGIN;
    const bool scaled = p.dtype == PT_FP16, states = has_initial || has_final || p.chunk_size < p.seq_len;
    const int64_t rows = (int64_t)p.batch * p.query_heads * p.seq_len * 4, heads = (int64_t)p.batch * p.key_heads;
    key_grads = sizes.steps_workspace && phase == PT_WHOLE && !has_final;
    scaled_q = arena.take(sizes.packed_q, scaled);
    scaled_normalizer = arena.take<float>(rows, scaled), row_scale = arena.take<float>(rows, scaled);
    row_limit = arena.take<float>((int64_t)p.batch * p.query_heads * 4, scaled);
    dn_scale = arena.take<float>(heads * 4, scaled);
    dn = kept.take(sizes.packed_dn);
    decayed_dn = arena.take(sizes.packed_dn, states && begins && !key_grads);
    grad_states = kept.take(sizes.states, states);
    scan_workspace = arena.take(key_grads ? sizes.steps_workspace : sizes.chunk_state_workspace, states && begins);
    leaving = arena.take<float>(sizes.boundary, has_final && finishes), entering = arena.take<float>(sizes.boundary, has_initial && begins);
    dots = arena.take<float>(sizes.dots * (p.query_heads / p.key_heads + 2), finishes);
    flow = arena.take<float>(heads * chunks(p.seq_len, p.chunk_size) * 4, states && finishes);
    bytes = arena.used(), begun_bytes = apart.used();
  }
};

int validate_phase(const pt_problem& p, int phase) {
  if (phase < PT_WHOLE || phase > PT_FINISH) return fail(PT_INVALID, "phase %d: PT_WHOLE, PT_BEGIN or PT_FINISH", phase);
  if (phase != PT_WHOLE && p.dtype == PT_FP16)
    return fail(PT_UNSUPPORTED, "a pass in two calls: not in fp16, where a state from outside may lower the scales of what the first call packs");
  return PT_OK;
}

}  // namespace
}  // namespace powertrain

using namespace powertrain;

extern "C" {

int pt_pass_sizes_of(const pt_problem* problem, int32_t phase, int32_t has_initial_state, int32_t has_final_state, pt_pass_sizes* result) {
  PT_REQUIRE(result);
  pt_sizes sizes;
  PT_TRY(pt_sizes_of(problem, &sizes));
  PT_TRY(validate_phase(*problem, phase));
  PT_REQUIRE(phase == PT_WHOLE || (has_initial_state && has_final_state));
  const Saved saved(*problem, sizes, has_initial_state, nullptr);
  const BackwardBuffers backward(*problem, sizes, phase, has_initial_state, has_final_state, nullptr, nullptr);
  result->saved = saved.bytes, result->scales = saved.scales;
  result->forward_workspace = ForwardBuffers(*problem, sizes, phase, has_initial_state, has_final_state, nullptr).bytes;
  result->backward_workspace = backward.bytes, result->begun = backward.begun_bytes;
  return PT_OK;
}

int pt_forward(const pt_problem* problem, const pt_forward_params* params, void* stream) {
  PT_REQUIRE(params && params->saved && (params->out.data || params->final_state));
  pt_sizes sizes;
  PT_TRY(pt_sizes_of(problem, &sizes));
  const pt_problem& p = *problem;
  const pt_forward_params& a = *params;
  PT_TRY(validate_phase(p, a.phase));
  PT_REQUIRE(a.phase != PT_BEGIN || !(a.initial_state || a.out.data));
  PT_REQUIRE(a.phase != PT_FINISH || (a.initial_state && !a.final_state));
  PT_REQUIRE(a.phase == PT_FINISH || (a.q.data && a.k.data && a.v.data));
  // A pass in two calls has both, though each call is given one.
  const bool has_initial = a.initial_state || a.phase == PT_BEGIN, has_final = a.final_state || a.phase == PT_FINISH;
  const Saved saved(p, sizes, has_initial, a.saved);
  const ForwardBuffers buffers(p, sizes, a.phase, has_initial, has_final, a.workspace);
  PT_REQUIRE(a.workspace || buffers.bytes == 0);
  const bool packs_later = buffers.steps && packs_on_the_way(p, false, has_final, {a.q, a.k, a.v});

  if (a.phase != PT_FINISH) {
    if (saved.q_scale) {
      const pt_power_scale_params of_q = {a.q, p.query_heads, p.query_heads, saved.q_scale}, of_k = {a.k, p.key_heads, p.key_heads, saved.k_scale},
                                  of_v = {a.v, p.key_heads, p.key_heads, saved.v_scale};
      PT_TRY(pt_power_scale(problem, &of_q, stream));
      PT_TRY(pt_power_scale(problem, &of_k, stream));
      PT_TRY(pt_power_scale(problem, &of_v, stream));
      if (has_initial) PT_TRY(bound_key_scale(p, a.initial_state, a.initial_sum_of_keys, saved.v_scale, saved.k_scale, (cudaStream_t)stream));
    }
    const pt_pack_params pack = {a.q, a.k, a.v, saved.q_scale, saved.k_scale, saved.v_scale,
                                 a.log_G, a.log_G_stride_b, a.log_G_stride_t, a.log_G_stride_h, a.cu_seqlens, a.num_cu_seqlens,
                                 saved.gates, packs_later ? nullptr : saved.q, packs_later ? nullptr : saved.k, packs_later ? nullptr : saved.v,
                                 buffers.decayed_v};
    PT_TRY(pt_pack(problem, &pack, stream));
  }
  if (buffers.initial) {
    const pt_boundary_params boundary = {const_cast<float*>(a.initial_state), const_cast<float*>(a.initial_sum_of_keys), buffers.initial, 1, 0,
                                         saved.k_scale, saved.v_scale, nullptr};
    PT_TRY(pt_boundary(problem, &boundary, stream));
  }
  void* const states = a.out.data || a.phase == PT_BEGIN ? saved.states : nullptr;
  const pt_chunk_state_params state = {0, saved.k, buffers.decayed_v, saved.gates, buffers.initial, states, buffers.final_state, buffers.scan_workspace};
  if (a.phase == PT_FINISH) {
    PT_TRY(carry_in(p, state, (cudaStream_t)stream));
  } else if (buffers.decayed_v) {
    PT_TRY(pt_chunk_state(problem, &state, stream));
  }
  if (buffers.steps) {
    const pt_tensor none = {};
    const pt_query_scan_params scan = {saved.q, saved.k, saved.v, packs_later && a.out.data ? a.q : none, packs_later ? a.k : none, packs_later ? a.v : none,
                                       saved.gates, buffers.initial, a.out, a.normalizer, states, buffers.final_state, buffers.scan_workspace};
    PT_TRY(pt_query_scan(problem, &scan, stream));
  }
  if (buffers.final_state) {
    const pt_boundary_params boundary = {a.final_state, a.final_sum_of_keys, buffers.final_state, 0, 0, saved.k_scale, saved.v_scale, nullptr};
    PT_TRY(pt_boundary(problem, &boundary, stream));
  }
  if (!a.out.data || buffers.steps) return PT_OK;
  const pt_chunk_scan_params scan = {0, has_initial, saved.q, saved.k, saved.v, saved.gates, saved.states, a.out, saved.v_scale, a.normalizer};
  return pt_chunk_scan(problem, &scan, stream);
}

int pt_backward(const pt_problem* problem, const pt_backward_params* params, void* stream) {
  PT_REQUIRE(params && params->saved && params->workspace);
  pt_sizes sizes;
  PT_TRY(pt_sizes_of(problem, &sizes));
  const pt_problem& p = *problem;
  const pt_backward_params& a = *params;
  PT_TRY(validate_phase(p, a.phase));
  const bool has_initial = a.has_initial_state, has_final = a.dfinal_state || a.phase == PT_BEGIN, initial_only = !a.dq.data;
  PT_REQUIRE(a.phase == PT_WHOLE || (has_initial && a.begun));
  PT_REQUIRE(a.phase != PT_BEGIN || (initial_only && !a.dfinal_state));
  PT_REQUIRE(a.phase != PT_FINISH || (!initial_only && a.dfinal_state && !a.dinitial_state));
  PT_REQUIRE(a.phase == PT_FINISH || (a.normalizer && (!has_initial || (a.dinitial_state && a.dinitial_sum_of_keys))));
  PT_REQUIRE(initial_only ? has_initial : a.dk.data && a.dv.data);
  const Saved saved(p, sizes, has_initial, a.saved);
  const BackwardBuffers buffers(p, sizes, a.phase, has_initial, has_final, a.workspace, a.begun);
  const void* q = saved.q;
  const float* normalizer = a.normalizer;
  if (buffers.scaled_q) {
    const pt_row_scale_params rows = {saved.q, normalizer, buffers.scaled_q, buffers.scaled_normalizer, buffers.row_scale, buffers.row_limit};
    PT_TRY(pt_row_scale(problem, &rows, stream));
    q = buffers.scaled_q, normalizer = buffers.scaled_normalizer;
  }
  const bool packs_later = buffers.key_grads && packs_on_the_way(p, true, has_initial, {a.dy, a.y});
  if (a.phase != PT_FINISH && !packs_later) {
    const pt_pack_grad_params pack = {a.dy,        a.y,
                                      normalizer,  saved.v_scale,
                                      buffers.dn_scale, buffers.dn,
                                      saved.gates, buffers.decayed_dn,
                                      a.dfinal_state, a.dfinal_sum_of_keys,
                                      saved.k_scale};
    PT_TRY(pt_pack_grad(problem, &pack, stream));
  }
  if (buffers.leaving) {
    const pt_boundary_params boundary = {const_cast<float*>(a.dfinal_state), const_cast<float*>(a.dfinal_sum_of_keys), buffers.leaving, 1, 1,
                                         saved.k_scale, saved.v_scale, buffers.dn_scale};
    PT_TRY(pt_boundary(problem, &boundary, stream));
  }
  const pt_boundary_params boundary = {a.dinitial_state, a.dinitial_sum_of_keys, buffers.entering, 0, 1, saved.k_scale, saved.v_scale, buffers.dn_scale};
  void* const states = initial_only && a.phase == PT_WHOLE ? nullptr : buffers.grad_states;
  const pt_chunk_state_params state = {1, q, buffers.decayed_dn, saved.gates, buffers.leaving, states, buffers.entering, buffers.scan_workspace};
  if (a.phase == PT_FINISH) {
    PT_TRY(carry_in(p, state, (cudaStream_t)stream));
  } else if (buffers.decayed_dn) {
    PT_TRY(pt_chunk_state(problem, &state, stream));
  }
  // q . dq of every query head, then k . dk of every key head and its part from later chunks.
  float* const query_dots = a.dlog_G && !initial_only ? buffers.dots : nullptr;
  float* const key_dots = query_dots ? query_dots + sizes.dots / 4 * (p.query_heads / p.key_heads) : nullptr;
  if (buffers.key_grads) {
    // Before dq, which reads dn'.
    const pt_tensor none = {};
    const pt_key_grads_params of_k = {q, saved.k, saved.v, buffers.dn, packs_later ? a.dy : none, packs_later ? a.y : none, packs_later ? normalizer : nullptr,
                                      saved.gates, a.dv, a.dk, key_dots, query_dots ? buffers.grad_states : nullptr, buffers.entering, buffers.scan_workspace};
    PT_TRY(pt_key_grads(problem, &of_k, stream));
  }
  if (!initial_only) {
    const pt_chunk_scan_grad_params of_q = {0,    has_initial,   q,             saved.k,          saved.v, buffers.dn, saved.gates, saved.states,
                                            a.dq, saved.q_scale, saved.v_scale, buffers.dn_scale, buffers.row_scale,     query_dots};
    // Before dk by the same stage: `powertrain bench kernels` tells both calls apart by their order.
    PT_TRY(pt_chunk_scan_grad(problem, &of_q, stream));
  }
  if (initial_only) return pt_boundary(problem, &boundary, stream);
  if (!buffers.key_grads) {
    const pt_chunk_scan_params scan = {1, has_final, q, saved.k, buffers.dn, saved.gates, buffers.grad_states, a.dv, buffers.dn_scale, nullptr};
    PT_TRY(pt_chunk_scan(problem, &scan, stream));
    const pt_chunk_scan_grad_params of_k = {1,    has_final,     q,             saved.k,          saved.v, buffers.dn, saved.gates, buffers.grad_states,
                                            a.dk, saved.k_scale, saved.v_scale, buffers.dn_scale, nullptr,               key_dots};
    PT_TRY(pt_chunk_scan_grad(problem, &of_k, stream));
  }
  if (query_dots) {
    if (buffers.flow) {
      const bool every_chunk = has_initial || has_final || p.dtype == PT_FP16;
      const pt_state_flow_params flow = {saved.states, buffers.grad_states, saved.gates, buffers.key_grads ? nullptr : key_dots, every_chunk, buffers.flow};
      PT_TRY(pt_state_flow(problem, &flow, stream));
    }
    const pt_gate_grad_params gates = {query_dots,       key_dots,    buffers.flow,     buffers.key_grads ? key_dots + sizes.dots / 4 : nullptr,
                                       saved.gates,      a.has_documents, has_initial,  buffers.dn_scale,
                                       saved.v_scale,    a.dlog_G,    a.dlog_G_stride_b, a.dlog_G_stride_t,
                                       a.dlog_G_stride_h};
    PT_TRY(pt_gate_grad(problem, &gates, stream));
  }
  return buffers.entering ? pt_boundary(problem, &boundary, stream) : PT_OK;
}

}  // extern "C"
