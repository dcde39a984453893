/* powertrain kernels: power retention of degree 2, forward and backward, behind a plain C ABI.
 *
 * One call runs one stage, or one whole pass, on one stream; nothing is allocated, nothing synchronises, no state is kept between calls, no exception
 * crosses the boundary. Every function returns a pt_status; pt_last_error() says what was wrong in one sentence (per host thread).
 *
 * Shapes: B batch, T tokens, Hq query heads, Hk key heads (Hq a multiple of Hk), K = V head dim, C chunk, N = ceil(T / C) chunks,
 * Tp = T rounded up to 64. The mathematics and the derivation of the stages are in docs/kernels.md, the memory layouts of every opaque
 * buffer in src/common/layout.cuh. The factor `scale` of the public op cancels in y = n / d, so no stage takes it.
 *
 * The forward of y = n / d:
 *     pt_pack                  q, k, v, log_G     -> packed q, k (transposed tiles), v' = [v, 1] (tiles), gates
 *     pt_chunk_state           k, v', gates       -> states entering each chunk, final state
 *     pt_chunk_scan            q, k, v', states   -> y, normalizer
 * The backward, with the roles exchanged and time reversed:
 *     pt_pack_grad             dy, y, normalizer  -> packed dn' = [dy / d, -(dy . y) / d]
 *     pt_chunk_state reverse   q, dn'             -> gradients of the states leaving each chunk, gradient of the initial state
 *     pt_chunk_scan reverse    k, q, dn', dstates -> dv
 *     pt_chunk_scan_grad       q, dn', states     -> dq, q . dq     (and reverse: k, v', dstates -> dk, k . dk)
 *     pt_state_flow            states, dstates    -> dlog_G beyond the ends of some chunks
 *     pt_gate_grad             the last three     -> dlog_G
 * or, where they take the problem, in place of pt_chunk_state and pt_chunk_scan, and of the three reverse stages:
 *     pt_query_scan            q, k, v'           -> y, normalizer, states entering each chunk, final state
 *     pt_key_grads             q, k, v', dn'      -> dv, dk, k . dk, gradients of the states leaving each chunk, gradient of the initial state
 * Beside it, the loss of a language model's head:
 *     pt_cross_entropy         logits, labels     -> losses, gradients in place of the logits
 */
#ifndef POWERTRAIN_KERNELS_H
#define POWERTRAIN_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PT_ABI_VERSION 13
#define PT_API __attribute__((visibility("default")))

typedef enum { PT_OK = 0, PT_INVALID = 1, PT_UNSUPPORTED = 2, PT_CUDA_ERROR = 3 } pt_status;
typedef enum { PT_BF16 = 0, PT_FP16 = 1, PT_FP32 = 2 } pt_dtype;
typedef enum { PT_ARCH_AUTO = 0, PT_ARCH_SM80 = 80, PT_ARCH_SM90 = 90 } pt_arch;
typedef enum { PT_STAGE_CHUNK_STATE = 0, PT_STAGE_CHUNK_SCAN = 1, PT_STAGE_CHUNK_SCAN_GRAD = 2 } pt_stage;

/* A (B, T, H, D) tensor whose last dimension is contiguous; strides in elements. data may be null where a stage says so. */
typedef struct {
  void* data;
  int64_t stride_b, stride_t, stride_h;
} pt_tensor;

/* What every stage needs to know. Zero in `arch` picks: sm90 where the device is 9.x and the configuration is compiled for it. */
typedef struct {
  int32_t dtype;       /* pt_dtype of q, k, v and of all packed buffers and states: PT_BF16 or PT_FP16 */
  int32_t arch;        /* pt_arch */
  int32_t batch;       /* B >= 1 */
  int32_t query_heads; /* Hq */
  int32_t key_heads;   /* Hk */
  int32_t head_dim;    /* K = V: 32, 64 or 128 */
  int32_t chunk_size;  /* C, a multiple of 64 */
  float state_scale;   /* power of two that the 16-bit states are multiplied by (1 in bf16; see docs/kernels.md for fp16) */
  int64_t seq_len;     /* T >= 1 */
} pt_problem;

/* Bytes of the opaque buffers of a problem. Buffers need an alignment of 256 bytes (torch.empty gives 512). */
typedef struct {
  int64_t packed_q;              /* q */
  int64_t packed_k;              /* k */
  int64_t packed_v;              /* v' */
  int64_t packed_dn;             /* dn' */
  int64_t gates;                 /* the decays that pt_pack forms */
  int64_t states;                /* one direction's 16-bit states, one per chunk */
  int64_t boundary;              /* one fp32 boundary state (initial, final or their gradients) */
  int64_t dots;                  /* one fp32 number for each (B, Hk, Tp) */
  int64_t chunk_state_workspace; /* may be 0 */
  int64_t steps_workspace;       /* of pt_query_scan and pt_key_grads; 0 where they do not take the problem */
  int64_t reserved[6];
} pt_sizes;

/* A kernel of the library, for `powertrain kernels info` and for the build's check on spills. */
typedef struct {
  char name[96];
  int32_t arch;         /* 80 or 90; 0 for the architecture-neutral ones */
  int32_t registers;    /* per thread */
  int32_t local_bytes;  /* stack and spills per thread */
  int32_t shared_bytes; /* per block, static and dynamic */
  int32_t threads;      /* per block */
} pt_kernel_attributes;

PT_API int pt_abi_version(void);
PT_API const char* pt_last_error(void);                                            /* of this host thread; "" if none */
PT_API int pt_sizes_of(const pt_problem* problem, pt_sizes* sizes);                /* no device needed except for the workspaces */
PT_API int pt_selected_arch(const pt_problem* problem, int32_t stage, int32_t* arch); /* what PT_ARCH_AUTO picks on this device */
PT_API int pt_compiled_archs(int32_t* archs, int32_t capacity, int32_t* count);    /* 80 and/or 90 */
PT_API int pt_kernel_count(int32_t* count);
PT_API int pt_kernel_info(int32_t index, pt_kernel_attributes* attributes);        /* needs a device */

/* --- small, architecture-neutral stages (src/common) ------------------------------------------------------------------------- */

/* fp16's rescue from overflow: scale = 2^-e with max |x| * scale in (0.5, 1], 1 where x is all zero; (B, groups) fp32, where each
 * group covers heads / groups consecutive heads. */
typedef struct {
  pt_tensor x;    /* (B, T, heads, K) of problem.dtype */
  int32_t heads;
  int32_t groups; /* divides heads */
  float* scale;   /* (B, groups) */
} pt_power_scale_params;
PT_API int pt_power_scale(const pt_problem* problem, const pt_power_scale_params* params, void* stream);

/* fp16's second rescue, before the backward pass: y does not depend on the length of a query, so each is multiplied by a power of two near
 * d^(-3/8), in [2^-6, 2^7]. That leaves d, and so dn', a quarter of its range in powers of two. The upper end is lower where |q_i| would add up to
 * more than 128, and (q . k)^2 to more than 2^14; and for a whole head, down to 2, where so many rows would be lengthened that the state's gradient
 * could overflow. Gradients of q are multiplied by row_scale after. */
typedef struct {
  const void* packed_q;
  const float* normalizer;  /* (B, Hq, T) as pt_chunk_scan wrote it */
  void* scaled_q;           /* out, packed */
  float* scaled_normalizer; /* out, (B, Hq, T): d row_scale^2 */
  float* row_scale;         /* out, (B, Hq, T) */
  float* row_limit;         /* out, (B, Hq): the exponent of the largest row_scale that is allowed */
} pt_row_scale_params;
PT_API int pt_row_scale(const pt_problem* problem, const pt_row_scale_params* params, void* stream);

/* Copies q, k and v into tiles of 64 tokens, zero beyond T; v with a column of ones appended, and once more with every token's decay to its
 * chunk's end multiplied in, for pt_chunk_state. On the way, the decays of every token within its 64-token block and its chunk, with documents as
 * gates that close (see layout.cuh, gates); these alone where there is nowhere to pack to, because pt_query_scan does. */
typedef struct {
  pt_tensor q, k, v;        /* (B, T, Hq, K), (B, T, Hk, K), (B, T, Hk, V) of problem.dtype */
  const float* query_scale; /* (B, Hq) powers of two that q is multiplied by, or null */
  const float* key_scale;   /* (B, Hk), or null */
  const float* value_scale; /* (B, Hk), not of the ones column, or null */
  const float* log_G;       /* (B, T, Hk) fp32 <= 0, or null: no gates */
  int64_t log_G_stride_b, log_G_stride_t, log_G_stride_h;
  const int32_t* cu_seqlens; /* (num_cu_seqlens,) offsets over the flattened B*T tokens, every row start among them, or null */
  int32_t num_cu_seqlens;
  void* gates;              /* out, pt_sizes.gates bytes */
  void *packed_q, *packed_k, *packed_v; /* out, or all null, and decayed_v, too: then q, k and v are not read */
  void* decayed_v;          /* pt_sizes.packed_v bytes, the ones column as hi + lo in two columns; or null */
} pt_pack_params;
PT_API int pt_pack(const pt_problem* problem, const pt_pack_params* params, void* stream);

/* dn' = [dy / d, -(dy . y) / d], its last column as hi + lo in two columns and computed from the rounded first columns, so that the row
 * sums dn' . o' vanish as they do in exact arithmetic. Rows whose |d| is zero give zeros. */
typedef struct {
  pt_tensor dy;             /* (B, T, Hq, V) of problem.dtype */
  pt_tensor y;              /* (B, T, Hq, V) of problem.dtype */
  const float* normalizer;  /* (B, Hq, T) as pt_chunk_scan wrote it */
  const float* value_scale; /* (B, Hk) scale that v was packed with, or null: y is brought back to packed units with it */
  float* dn_scale;          /* (B, Hk) out: the power of two that dn' was multiplied by; null in bf16 (no scale) */
  void* packed_dn;          /* out */
  const void* gates;        /* with decayed: as pt_pack wrote it; else null */
  void* decayed;            /* out, pt_sizes.packed_dn bytes: dn' times every token's decay from its chunk's start; or null */
  /* fp16 with a gradient of the final state: dn_scale is lowered until that fits, too, in packed units. Else null. */
  const float* dfinal_state;       /* (B, Hk, F, V) contiguous */
  const float* dfinal_sum_of_keys; /* (B, Hk, F) contiguous */
  const float* key_scale;          /* (B, Hk) scale that k was packed with */
} pt_pack_grad_params;
PT_API int pt_pack_grad(const pt_problem* problem, const pt_pack_grad_params* params, void* stream);

/* dlog_G beyond the end of chunks, the sum of w_ij dW_ij over the pairs on both sides of it, as what passes through the chunk from before it,
 * chunk_decay_n <states_n, grad_states_n>, and what its keys give to later chunks: (B, Hk, N) fp32 in packed units. Where key_dots is null,
 * after pt_key_grads, it is <states_{n+1}, grad_states_n>, and zero beyond the last chunk. Infinite where pt_gate_grad is to add it up from the next chunk that
 * is known: at most three chunks further, and not where strong gates lie between. */
typedef struct {
  const void* states;      /* forward; null: nothing entered the only chunk */
  const void* grad_states; /* reverse */
  const void* gates;
  const float* key_dots;   /* as pt_chunk_scan_grad reverse wrote it; or null: after pt_key_grads */
  int32_t every_chunk;     /* if 1, none is left to be added up: fp16, and states from or to the outside, whose passes hold tighter bounds */
  float* flow;             /* out */
} pt_state_flow_params;
PT_API int pt_state_flow(const pt_problem* problem, const pt_state_flow_params* params, void* stream);

/* dlog_G_t = sum of w_ij dW_ij over the pairs i >= t > j, from the ends of chunks where `flow` holds it to the left: what token t receives as a
 * query crosses its gate, what it gives as a key does not, dlog_G_t = dlog_G_{t+1} + query_dots_t - key_dots_t. Both dots come from the same rounded
 * terms, so that pairs of a chunk on one side of t cancel. */
typedef struct {
  const float* query_dots;   /* as pt_chunk_scan_grad wrote it */
  const float* key_dots;     /* as pt_chunk_scan_grad reverse wrote it */
  const float* flow;         /* as pt_state_flow wrote it, or null: nothing goes on beyond the only chunk */
  const float* step_dots;    /* the part from later steps, as pt_key_grads wrote it after key_dots; or null: after pt_chunk_scan_grad. Where less than
                                2^-8 is left of the decay across a step, its sum is dlog_G beyond the step's end */
  const void* gates;         /* as pt_pack wrote them; may be null with neither step_dots nor has_documents */
  int32_t has_documents;
  int32_t has_initial_state; /* if 0, nothing passes the gate of a row's first token, and its gradient is zero exactly */
  const float* dn_scale;     /* (B, Hk) divided out, or null */
  const float* value_scale;  /* (B, Hk) divided out, or null */
  float* dlog_G;             /* (B, T, Hk) out */
  int64_t dlog_G_stride_b, dlog_G_stride_t, dlog_G_stride_h;
} pt_gate_grad_params;
PT_API int pt_gate_grad(const pt_problem* problem, const pt_gate_grad_params* params, void* stream);

/* Public states, exact upper-triangular (B, Hk, F, V) and (B, Hk, F), F = K (K + 1) / 2, weight sqrt(2) off the diagonal, to and from
 * boundary states. `gradient` converts gradients with respect to them (the transpose of the other direction's map). */
typedef struct {
  float* state;        /* (B, Hk, F, V) contiguous fp32 */
  float* sum_of_keys;  /* (B, Hk, F) contiguous fp32 */
  float* boundary;     /* pt_sizes.boundary bytes */
  int32_t to_boundary; /* 1: public -> boundary, 0: boundary -> public */
  int32_t gradient;    /* 1: the arrays hold gradients */
  const float* key_scale;   /* (B, Hk) scale that k was packed with, or null */
  const float* value_scale; /* (B, Hk) scale that v was packed with, or null */
  const float* dn_scale;    /* (B, Hk) gradients: what dn' was multiplied by, or null */
} pt_boundary_params;
PT_API int pt_boundary(const pt_problem* problem, const pt_boundary_params* params, void* stream);

/* --- the three stages (src/sm90, src/sm80) ------------------------------------------------------------------------------------ */

/* states[n] = state entering chunk n: S_0 = initial, S_{n+1} = chunk_decay_n S_n + sum_j phi(x_j)^T u_j, where u carries decay_out_j.
 * reverse: states[n] = gradient of the state leaving chunk n: E_N = initial, E_n = chunk_decay_n E_{n+1} + sum_i phi(x_i)^T u_i, where u
 * carries decay_in_i, summed over the query heads of each key head. */
typedef struct {
  int32_t reverse;
  const void* x;        /* packed k; reverse: packed q */
  const void* u;        /* decayed v'; reverse: decayed dn' */
  const void* gates;
  const float* initial; /* boundary state, or null: zero */
  void* states;         /* out, pt_sizes.states bytes, or null: only final is wanted */
  float* final_state;   /* out, boundary state, or null */
  void* workspace;      /* pt_sizes.chunk_state_workspace bytes */
} pt_chunk_state_params;
PT_API int pt_chunk_state(const pt_problem* problem, const pt_chunk_state_params* params, void* stream);

/* forward: o'_i = decay_in_i phi(q_i) S + sum_{j <= i} (q_i . k_j)^2 decay_ij v'_j within the chunk; y = n / d (0 where d is 0).
 * reverse: dv'_j = decay_out_j phi(k_j) E + sum_{i >= j} (q_i . k_j)^2 decay_ij dn'_i, summed over the query heads of the key head. */
typedef struct {
  int32_t reverse;
  int32_t has_boundary;   /* the state entering the first chunk (reverse: leaving the last) is not zero */
  const void* q;          /* packed */
  const void* k;          /* packed */
  const void* u;          /* packed v'; reverse: packed dn' */
  const void* gates;
  const void* states;     /* of the same direction; may be null if N = 1 and not has_boundary */
  pt_tensor out;          /* y (B, T, Hq, V); reverse: dv (B, T, Hk, V); of problem.dtype */
  const float* out_scale; /* y: (B, Hk), dv: (B, Hk): out is divided by it, or null (y: value_scale, dv: dn_scale) */
  float* normalizer;      /* forward: (B, Hq, T) out, d in packed units */
} pt_chunk_scan_params;
PT_API int pt_chunk_scan(const pt_problem* problem, const pt_chunk_scan_params* params, void* stream);

/* forward: dq_i = d(dn'_i . o'_i) / dq_i with the state and the keys held; reverse: dk_j = d(v'_j . dv'_j) / dk_j. */
typedef struct {
  int32_t reverse;
  int32_t has_boundary;
  const void* q;            /* packed */
  const void* k;            /* packed */
  const void* v;            /* packed v' */
  const void* dn;           /* packed dn' */
  const void* gates;
  const void* states;       /* forward: states; reverse: their gradients; may be null as in pt_chunk_scan */
  pt_tensor out;            /* dq (B, T, Hq, K); reverse: dk (B, T, Hk, K); of problem.dtype */
  const float* x_scale;     /* dq: (B, Hq) scale of q, dk: (B, Hk) scale of k: out is multiplied by it, or null */
  const float* value_scale; /* (B, Hk) out is divided by it, or null */
  const float* dn_scale;    /* (B, Hk) out is divided by it, or null */
  const float* row_scale;   /* dq: (B, Hq, T) out is multiplied by it, as pt_row_scale wrote it; or null */
  float* dots;              /* out, in packed units before any scale, 0 beyond T, from the fp32 gradients; or null. (q_i . dq_i) / 2,
                               (B, Hq, Tp): sum_j w_ij dW_ij over everything before i. Reverse: (2, B, Hk, Tp): (k_j . dk_j) / 2, the sum
                               over everything after j; then its part from later chunks, decay_out_j phi(k_j) E v'_j. */
} pt_chunk_scan_grad_params;
PT_API int pt_chunk_scan_grad(const pt_problem* problem, const pt_chunk_scan_grad_params* params, void* stream);

/* What pt_chunk_state and pt_chunk_scan compute, in one, in steps of 128 tokens from the start of the row on: on Hopper, at head dim 32 in bf16, with
 * chunks of 128, 256, 384 or 512 tokens, more than one of them.
 * It can pack the tokens as it reads them for the first time: bytes that move while products are computed (pt_packs_on_the_way says whether it does). */
typedef struct {
  void *q, *k, *v;        /* packed; out where the next three are given. q may be null without out */
  pt_tensor unpacked_q, unpacked_k, unpacked_v; /* (B, T, Hq, K), (B, T, Hk, K), (B, T, Hk, V), the first only with out; or their .data are null:
                                                   pt_pack has packed them */
  const void* gates;
  const float* initial;   /* boundary state, or null: zero */
  pt_tensor out;          /* y (B, T, Hq, V); out.data may be null with final_state: nothing else is computed */
  float* normalizer;      /* (B, Hq, T) out */
  void* states;           /* out, as pt_chunk_state writes them */
  float* final_state;     /* out, boundary state, or null */
  void* workspace;        /* pt_sizes.steps_workspace bytes */
} pt_query_scan_params;
PT_API int pt_query_scan(const pt_problem* problem, const pt_query_scan_params* params, void* stream);

/* What the reverse stages compute, in one: where pt_query_scan takes the problem, and with no gradient of the final state. Where it
 * reads the tokens twice, since it splits time or final_state is wanted, it can pack dn', too. */
typedef struct {
  const void *q, *k, *v;      /* packed */
  void* dn;                   /* packed; out where dy is given */
  pt_tensor dy, y;            /* (B, T, Hq, V), or their .data are null: pt_pack_grad has packed them */
  const float* normalizer;    /* (B, Hq, T) with dy, else null */
  const void* gates;
  pt_tensor dv, dk;           /* (B, T, Hk, K); both .data may be null with final_state: nothing else is computed */
  float* dots;                /* out, (2, B, Hk, Tp): (k_j . dk_j) / 2, as in pt_chunk_scan_grad, then its part from later steps (of 128 tokens, as
                                 in pt_query_scan); or null */
  void* grad_states;          /* out, as pt_chunk_state reverse writes them; or null */
  float* final_state;         /* out, boundary state, the gradient of the initial state; or null */
  void* workspace;            /* pt_sizes.steps_workspace bytes */
} pt_key_grads_params;
PT_API int pt_key_grads(const pt_problem* problem, const pt_key_grads_params* params, void* stream);

/* Whether pt_query_scan packs q, k and v, or in reverse pt_key_grads dy and y, of these tensors: rows have to begin at multiples of 16 bytes, and
 * pt_key_grads packs where it splits time, or final_state is wanted. */
PT_API int pt_packs_on_the_way(const pt_problem* problem, int32_t reverse, int32_t has_final_state, const pt_tensor* tensors, int32_t count, int32_t* packs);

/* --- whole passes: the stages above in order (src/common/passes.cu) ------------------------------------------------------------ */

/* A pass may be two calls, where the state that enters is known only after the one that the tokens leave by themselves has been sent (context
 * parallelism; in the backward pass their gradients, with time reversed). PT_BEGIN scans the states as if nothing entered and gives the one at their
 * end, PT_FINISH adds to them what enters and runs the other stages: nothing is computed twice. bf16 only: in fp16 the state that enters may lower
 * the scales that everything is packed with. */
typedef enum { PT_WHOLE = 0, PT_BEGIN = 1, PT_FINISH = 2 } pt_phase;

/* What the forward pass leaves for the backward pass, and what one call of each needs while it runs, in bytes. */
typedef struct {
  int64_t saved;
  int64_t forward_workspace;
  int64_t backward_workspace;
  int64_t scales; /* offset in `saved` of the powers of two (B, Hq) of q, (B, Hk) of k, (B, Hk) of v, fp32; fp16 only */
  int64_t begun;  /* what a backward pass in two calls keeps between them; 0 in one call */
} pt_pass_sizes;
/* A pass in two calls has an initial and a final state. */
PT_API int pt_pass_sizes_of(const pt_problem* problem, int32_t phase, int32_t has_initial_state, int32_t has_final_state, pt_pass_sizes* sizes);

/* PT_BEGIN: final_state is that of the tokens from an empty state; no initial_state, no out. PT_FINISH: `saved` is as PT_BEGIN wrote it, and of the
 * inputs only initial_state is read; no final_state. */
typedef struct {
  int32_t phase; /* pt_phase */
  pt_tensor q, k, v;
  const float* log_G; /* (B, T, Hk) fp32 <= 0, or null */
  int64_t log_G_stride_b, log_G_stride_t, log_G_stride_h;
  const int32_t* cu_seqlens; /* as in pt_pack */
  int32_t num_cu_seqlens;
  const float* initial_state;       /* (B, Hk, F, V) contiguous, or null: empty */
  const float* initial_sum_of_keys; /* (B, Hk, F) contiguous, or null */
  pt_tensor out;                    /* (B, T, Hq, V); data null: only the final state is wanted, and its stages alone run */
  float* normalizer;                /* (B, Hq, T), in packed units */
  float* final_state;               /* (B, Hk, F, V) contiguous, or null */
  float* final_sum_of_keys;
  void* saved;                      /* pt_pass_sizes.saved bytes */
  void* workspace;
} pt_forward_params;
PT_API int pt_forward(const pt_problem* problem, const pt_forward_params* params, void* stream);

/* PT_BEGIN: dinitial_state is the gradient through the outputs alone; no dfinal_state, and nothing else comes out. PT_FINISH: `begun` is as PT_BEGIN
 * wrote it, dy, y and normalizer are not read; no dinitial_state. */
typedef struct {
  int32_t phase; /* pt_phase */
  pt_tensor dy, y;
  const float* normalizer; /* as pt_forward wrote it */
  const void* saved;       /* as pt_forward wrote it */
  int32_t has_documents;     /* the forward pass had cu_seqlens */
  int32_t has_initial_state; /* as in the forward pass */
  const float* dfinal_state; /* (B, Hk, F, V) contiguous, or null: zero */
  const float* dfinal_sum_of_keys;
  pt_tensor dq, dk, dv;      /* dq.data null: only dinitial_state is wanted, and its stages alone run */
  float* dlog_G; /* (B, T, Hk), or null: not wanted */
  int64_t dlog_G_stride_b, dlog_G_stride_t, dlog_G_stride_h;
  float* dinitial_state; /* where has_initial_state, (B, Hk, F, V) contiguous */
  float* dinitial_sum_of_keys;
  void* begun;           /* pt_pass_sizes.begun bytes, which PT_FINISH changes; null in one call */
  void* workspace;
} pt_backward_params;
PT_API int pt_backward(const pt_problem* problem, const pt_backward_params* params, void* stream);

/* --- the head's loss (src/common/cross_entropy.cu) ------------------------------------------------------------------------------- */

typedef struct {
  int32_t dtype;           /* of the logits: PT_BF16 or PT_FP16 */
  int32_t has_log_sum_exp; /* log_sum_exp is given, and not computed again */
  int32_t write_gradients; /* logits become d loss / d logits, times `factors` */
  int64_t rows, columns;
  int64_t row_stride; /* in elements; rows that begin at multiples of 16 bytes are fastest */
  void* logits;       /* (rows, columns) */
  const int64_t* labels;
  int64_t ignore_index; /* rows with this label have no loss and no gradient; another label outside of the columns gives NaN */
  const float* factors; /* (rows), or null: 1 */
  float* losses;        /* (rows) out: log sum exp - logit of the label; or null */
  float* log_sum_exp;   /* (rows) in or out, or null */
} pt_cross_entropy_params;
PT_API int pt_cross_entropy(const pt_cross_entropy_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif
