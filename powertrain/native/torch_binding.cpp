// The CUDA path's ops of torch.library: outputs and workspaces from torch's allocator, the structs of powertrain_kernels.h, the autograd node.
//
// powertrain/ops/cuda_ops.py defines the schemas and says what each op computes; powertrain/native/binding.py compiles this file against the
// installed torch and hands it the functions of the kernel library. Nothing here links CUDA or Python.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "powertrain_kernels.h"

namespace powertrain {
namespace {

using at::Tensor;
using c10::SymInt;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

// The functions of the kernel library, set once before the first call.
struct Library {
  decltype(&pt_forward) forward = nullptr;
  decltype(&pt_backward) backward = nullptr;
  decltype(&pt_pass_sizes_of) pass_sizes_of = nullptr;
  decltype(&pt_last_error) last_error = nullptr;
  bool emulated = false;  // computes on CPU tensors, before a call returns
} library;

// Messages are joined as strings, never by a stream: a compiler newer than the process's libstdc++ links parts of its own streams into this
// library, and theirs crash on a number.
std::string text(at::IntArrayRef shape) {
  std::string numbers;
  for (const int64_t size : shape) numbers += (numbers.empty() ? "" : ", ") + std::to_string(size);
  return "[" + numbers + "]";
}
std::string text(at::ScalarType dtype, at::IntArrayRef shape, at::Device device) {
  return c10::toString(dtype) + (" of shape " + text(shape) + " on " + device.str());
}

void check(int status, const char* name) { TORCH_CHECK(status == PT_OK, std::string(name) + ": " + library.last_error()); }

pt_dtype kernel_dtype(const Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
                    std::string("the kernels take bfloat16 and float16; got ") + c10::toString(x.scalar_type()));
  return x.scalar_type() == at::kHalf ? PT_FP16 : PT_BF16;
}

// fp16: |phi| and |v'| are at most 1 in packed units and a state sums at most T of them; its gradient T Hq / Hk, with queries lengthened where
// weights are small (pt_row_scale: by more than 2 only where the sum stays within a quarter of this bound). Twice that off the diagonal; half of
// the largest number is left as headroom.
float state_scale(pt_dtype dtype, int64_t tokens, int64_t group) {
  if (dtype != PT_FP16) return 1;
  return std::ldexp(1.f, -std::max(0, (int)std::ceil(std::log2(8.0 * (double)(tokens * group))) - 15));
}

// One call of a pass: the problem, the sizes of its buffers, and the device and stream that it runs on.
class Pass {
 public:
  // `like` (B, T, Hq, D) has the shape of the queries. A pass in two calls has both states.
  Pass(const Tensor& like, int64_t key_heads, int64_t chunk_size, int64_t arch, bool has_initial_state, bool has_final_state,
       pt_phase phase = PT_WHOLE)
      : B(like.size(0)), T(like.size(1)), Hq(like.size(2)), Hk(key_heads), D(like.size(3)), guard_(like.device()), options_(like.options()) {
    TORCH_CHECK(library.forward, "the kernel library is not loaded; powertrain.power_retention loads it");
    const pt_dtype dtype = kernel_dtype(like);
    TORCH_CHECK_VALUE(Hk > 0, "there are no key heads");
    problem_ = {.dtype = dtype,
                .arch = (int32_t)arch,
                .batch = (int32_t)B,
                .query_heads = (int32_t)Hq,
                .key_heads = (int32_t)Hk,
                .head_dim = (int32_t)D,
                .chunk_size = (int32_t)chunk_size,
                .state_scale = state_scale(dtype, T, Hq / Hk),
                .seq_len = T};
    check(library.pass_sizes_of(&problem_, phase, has_initial_state, has_final_state, &sizes), "pt_pass_sizes_of");
    if (like.is_cuda()) {
      const c10::impl::VirtualGuardImpl device(at::kCUDA);
      stream_ = device.getStreamNativeHandle(device.getStream(like.device()));
    } else {
      TORCH_CHECK_VALUE(library.emulated, "the kernels need a CUDA device; the tensors are on " + like.device().str());
    }
  }

  Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) const { return at::empty(shape, options_.dtype(dtype)); }
  Tensor bytes(int64_t size) const { return empty({size}, at::kByte); }
  int64_t phi_dimension() const { return D * (D + 1) / 2; }
  // Undefined, which Python sees as None, where not wanted: even a tensor of size 0 takes the host's time.
  Tensor state(bool wanted) const { return wanted ? empty({B, Hk, phi_dimension(), D}, at::kFloat) : Tensor(); }
  Tensor sum_of_keys(bool wanted) const { return wanted ? empty({B, Hk, phi_dimension()}, at::kFloat) : Tensor(); }

  // The op's `saved` ends with the normalizer (B, Hq, T), fp32, after the library's own part.
  int64_t saved_bytes() const { return sizes.saved + B * Hq * T * 4; }
  float* normalizer(const Tensor& saved) const { return reinterpret_cast<float*>(static_cast<char*>(saved.data_ptr()) + sizes.saved); }

  // `saved` and the workspace of a forward pass. A small workspace lies behind `saved` in one allocation, and stays as long: another one would
  // take the host longer than so little memory is worth.
  struct ForwardBuffers {
    Tensor saved;
    void* workspace;
    Tensor apart;  // a large workspace
  };
  ForwardBuffers forward_buffers() const {
    constexpr int64_t kSmall = 1 << 20, kAlignment = 256;
    const int64_t kept = saved_bytes(), end = (kept + kAlignment - 1) / kAlignment * kAlignment;
    if (sizes.forward_workspace > kSmall) {
      const Tensor apart = bytes(sizes.forward_workspace);
      return {bytes(kept), apart.data_ptr(), apart};
    }
    const Tensor saved = bytes(end + sizes.forward_workspace);
    saved.unsafeGetTensorImpl()->set_sizes_contiguous({kept});
    return {saved, static_cast<char*>(saved.data_ptr()) + end, {}};
  }

  // The kernels read what they are told is there.
  void check_tensor(const char* name, const Tensor& x, at::IntArrayRef shape, at::ScalarType dtype) const {
    const at::Device device = options_.device();
    TORCH_CHECK_VALUE(x.scalar_type() == dtype && x.sizes() == shape && x.device() == device,
                      name + (" must be " + text(dtype, shape, device)) + "; got " + text(x.scalar_type(), x.sizes(), x.device()));
  }
  void check_state(const char* name, const OptionalTensor& x) const {
    if (x) check_tensor(name, *x, {B, Hk, phi_dimension(), D}, at::kFloat);
  }
  void check_sum(const char* name, const OptionalTensor& x) const {
    if (x) check_tensor(name, *x, {B, Hk, phi_dimension()}, at::kFloat);
  }
  void check_offsets(const OptionalTensor& x) const {
    if (x) check_tensor("cu_seqlens", *x, {x->numel()}, at::kInt);
  }

  void forward(const pt_forward_params& params) const { check(library.forward(&problem_, &params, stream_), "pt_forward"); }
  void backward(const pt_backward_params& params) const { check(library.backward(&problem_, &params, stream_), "pt_backward"); }

  const int64_t B, T, Hq, Hk, D;
  pt_pass_sizes sizes{};

 private:
  const c10::DeviceGuard guard_;  // kernels go to the current device
  const at::TensorOptions options_;
  pt_problem problem_{};
  void* stream_ = nullptr;
};

// The kernels take any strides but the last.
Tensor with_contiguous_rows(const Tensor& x) { return x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous(); }
OptionalTensor contiguous(const OptionalTensor& x) { return x ? OptionalTensor(x->contiguous()) : x; }

pt_tensor strided(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

template <typename T>
T* pointer(const OptionalTensor& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}
float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// The inputs of pt_forward, held while their pointers are in use.
class ForwardInputs {
 public:
  ForwardInputs(const Pass& pass, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& log_g, const OptionalTensor& state,
                const OptionalTensor& sum_of_keys, const OptionalTensor& cu_seqlens)
      : q_(with_contiguous_rows(q)), k_(with_contiguous_rows(k)), v_(with_contiguous_rows(v)), log_g_(log_g), state_(contiguous(state)),
        sum_of_keys_(contiguous(sum_of_keys)), cu_seqlens_(contiguous(cu_seqlens)) {
    pass.check_tensor("k", k, {pass.B, pass.T, pass.Hk, pass.D}, q.scalar_type());
    pass.check_tensor("v", v, {pass.B, pass.T, pass.Hk, pass.D}, q.scalar_type());
    if (log_g) pass.check_tensor("log_g", *log_g, {pass.B, pass.T, pass.Hk}, at::kFloat);
    pass.check_state("state", state);
    pass.check_sum("sum_of_keys", sum_of_keys);
    pass.check_offsets(cu_seqlens);
  }

  pt_forward_params params() const {
    pt_forward_params p{};
    p.q = strided(q_), p.k = strided(k_), p.v = strided(v_);
    if (log_g_) {
      p.log_G = floats(*log_g_);
      p.log_G_stride_b = log_g_->stride(0), p.log_G_stride_t = log_g_->stride(1), p.log_G_stride_h = log_g_->stride(2);
    }
    p.cu_seqlens = pointer<int32_t>(cu_seqlens_);
    p.num_cu_seqlens = cu_seqlens_ ? (int32_t)cu_seqlens_->size(0) : 0;
    p.initial_state = pointer<float>(state_), p.initial_sum_of_keys = pointer<float>(sum_of_keys_);
    return p;
  }

 private:
  const Tensor q_, k_, v_;
  const OptionalTensor log_g_, state_, sum_of_keys_, cu_seqlens_;
};

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of q, k, v and log_g
using States = std::tuple<Tensor, Tensor, Tensor>;             // state, sum_of_keys, and what finishes the pass

Forward forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& log_g, const OptionalTensor& state,
                const OptionalTensor& sum_of_keys, const OptionalTensor& cu_seqlens, int64_t chunk_size, bool final_state, int64_t arch) {
  const Pass pass(q, k.size(2), chunk_size, arch, state.has_value(), final_state);
  const ForwardInputs inputs(pass, q, k, v, log_g, state, sum_of_keys, cu_seqlens);
  Tensor out = pass.empty({pass.B, pass.T, pass.Hq, pass.D}, q.scalar_type());
  Tensor new_state = pass.state(final_state), new_sum = pass.sum_of_keys(final_state);
  Pass::ForwardBuffers buffers = pass.forward_buffers();
  pt_forward_params params = inputs.params();
  params.out = strided(out);
  params.normalizer = pass.normalizer(buffers.saved);
  if (final_state) params.final_state = floats(new_state), params.final_sum_of_keys = floats(new_sum);
  params.saved = buffers.saved.data_ptr(), params.workspace = buffers.workspace;
  pass.forward(params);
  return {std::move(out), std::move(new_state), std::move(new_sum), std::move(buffers.saved)};
}

States final_state(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& log_g, const OptionalTensor& cu_seqlens,
                   int64_t chunk_size, bool keep, int64_t arch) {
  const pt_phase phase = keep ? PT_BEGIN : PT_WHOLE;
  const Pass pass(q, k.size(2), chunk_size, arch, keep, true, phase);
  const ForwardInputs inputs(pass, q, k, v, log_g, std::nullopt, std::nullopt, cu_seqlens);
  Tensor state = pass.state(true), sum_of_keys = pass.sum_of_keys(true);
  Tensor saved = pass.bytes(pass.saved_bytes());
  const Tensor workspace = pass.bytes(pass.sizes.forward_workspace);
  pt_forward_params params = inputs.params();
  params.phase = phase;
  params.final_state = floats(state), params.final_sum_of_keys = floats(sum_of_keys);
  params.saved = saved.data_ptr(), params.workspace = workspace.data_ptr();
  pass.forward(params);
  return {std::move(state), std::move(sum_of_keys), keep ? std::move(saved) : pass.bytes(0)};
}

Tensor finish(const Tensor& q, const Tensor& state, const Tensor& sum_of_keys, const Tensor& begun, int64_t key_heads, int64_t chunk_size,
              int64_t arch) {
  const Pass pass(q, key_heads, chunk_size, arch, true, true, PT_FINISH);
  pass.check_state("state", state);
  pass.check_sum("sum_of_keys", sum_of_keys);
  pass.check_tensor("begun", begun, {pass.saved_bytes()}, at::kByte);
  const Tensor state_rows = state.contiguous(), sum_rows = sum_of_keys.contiguous();
  Tensor out = pass.empty({pass.B, pass.T, pass.Hq, pass.D}, q.scalar_type());
  const Tensor workspace = pass.bytes(pass.sizes.forward_workspace);
  pt_forward_params params{};
  params.phase = PT_FINISH;
  params.initial_state = floats(state_rows), params.initial_sum_of_keys = floats(sum_rows);
  params.out = strided(out), params.normalizer = pass.normalizer(begun);
  params.saved = begun.data_ptr(), params.workspace = workspace.data_ptr();
  pass.forward(params);
  return out;
}

// The inputs of pt_backward, held while their pointers are in use.
class BackwardInputs {
 public:
  BackwardInputs(const Pass& pass, const OptionalTensor& grad_out, const OptionalTensor& grad_state, const OptionalTensor& grad_sum,
                 const Tensor& out, const Tensor& saved, const OptionalTensor& cu_seqlens)
      : grad_out_(grad_out ? OptionalTensor(with_contiguous_rows(*grad_out)) : grad_out), grad_state_(contiguous(grad_state)),
        grad_sum_(contiguous(grad_sum)), out_(out), saved_(saved), has_documents_(cu_seqlens.has_value()) {
    if (grad_out) pass.check_tensor("grad_out", *grad_out, out.sizes(), out.scalar_type());
    pass.check_tensor("saved", saved, {pass.saved_bytes()}, at::kByte);
    pass.check_state("grad_state", grad_state);
    pass.check_sum("grad_sum_of_keys", grad_sum);
    pass.check_offsets(cu_seqlens);
    normalizer_ = pass.normalizer(saved);
  }

  pt_backward_params params() const {
    pt_backward_params p{};
    if (grad_out_) p.dy = strided(*grad_out_);
    p.y = strided(out_), p.normalizer = normalizer_, p.saved = saved_.data_ptr();
    p.has_documents = has_documents_;
    p.dfinal_state = pointer<float>(grad_state_), p.dfinal_sum_of_keys = pointer<float>(grad_sum_);
    return p;
  }

 private:
  const OptionalTensor grad_out_, grad_state_, grad_sum_;
  const Tensor out_, saved_;
  const bool has_documents_;
  const float* normalizer_ = nullptr;
};

// The gradients of q, k, v and log_g, for pt_backward to write.
struct InputGradients {
  InputGradients(const Pass& pass, at::ScalarType dtype, bool has_gates, pt_backward_params& params)
      : q(pass.empty({pass.B, pass.T, pass.Hq, pass.D}, dtype)), k(pass.empty({pass.B, pass.T, pass.Hk, pass.D}, dtype)),
        v(pass.empty({pass.B, pass.T, pass.Hk, pass.D}, dtype)),
        log_g(has_gates ? pass.empty({pass.B, pass.T, pass.Hk}, at::kFloat) : Tensor()) {
    params.dq = strided(q), params.dk = strided(k), params.dv = strided(v);
    if (!has_gates) return;
    params.dlog_G = floats(log_g);
    params.dlog_G_stride_b = log_g.stride(0), params.dlog_G_stride_t = log_g.stride(1), params.dlog_G_stride_h = log_g.stride(2);
  }

  Tensor q, k, v, log_g;
};

Backward backward(const Tensor& grad_out, const OptionalTensor& grad_state, const OptionalTensor& grad_sum, const Tensor& out,
                  const Tensor& saved, const OptionalTensor& cu_seqlens, int64_t key_heads, bool has_gates, bool has_state, int64_t chunk_size,
                  int64_t arch) {
  const Pass pass(out, key_heads, chunk_size, arch, has_state, grad_state.has_value());
  const BackwardInputs inputs(pass, grad_out, grad_state, grad_sum, out, saved, cu_seqlens);
  pt_backward_params params = inputs.params();
  InputGradients grads(pass, out.scalar_type(), has_gates, params);
  Tensor dstate = pass.state(has_state), dsum = pass.sum_of_keys(has_state);
  const Tensor workspace = pass.bytes(pass.sizes.backward_workspace);
  params.has_initial_state = has_state;
  if (has_state) params.dinitial_state = floats(dstate), params.dinitial_sum_of_keys = floats(dsum);
  params.workspace = workspace.data_ptr();
  pass.backward(params);
  return {std::move(grads.q), std::move(grads.k), std::move(grads.v), std::move(grads.log_g), std::move(dstate), std::move(dsum)};
}

States initial_state_grad(const Tensor& grad_out, const Tensor& out, const Tensor& saved, int64_t key_heads, int64_t chunk_size, bool keep,
                          int64_t arch) {
  const pt_phase phase = keep ? PT_BEGIN : PT_WHOLE;
  const Pass pass(out, key_heads, chunk_size, arch, true, keep, phase);
  const BackwardInputs inputs(pass, grad_out, std::nullopt, std::nullopt, out, saved, std::nullopt);
  Tensor dstate = pass.state(true), dsum = pass.sum_of_keys(true), begun = pass.bytes(pass.sizes.begun);
  const Tensor workspace = pass.bytes(pass.sizes.backward_workspace);
  pt_backward_params params = inputs.params();
  params.phase = phase;
  params.has_initial_state = true;
  params.dinitial_state = floats(dstate), params.dinitial_sum_of_keys = floats(dsum);
  params.begun = begun.data_ptr(), params.workspace = workspace.data_ptr();
  pass.backward(params);
  return {std::move(dstate), std::move(dsum), std::move(begun)};
}

Gradients finish_bwd(const Tensor& grad_state, const Tensor& grad_sum, const Tensor& out, const Tensor& saved, const Tensor& begun,
                     const OptionalTensor& cu_seqlens, int64_t key_heads, bool has_gates, int64_t chunk_size, int64_t arch) {
  const Pass pass(out, key_heads, chunk_size, arch, true, true, PT_FINISH);
  const BackwardInputs inputs(pass, std::nullopt, grad_state, grad_sum, out, saved, cu_seqlens);
  pass.check_tensor("begun", begun, {pass.sizes.begun}, at::kByte);
  pt_backward_params params = inputs.params();
  InputGradients grads(pass, out.scalar_type(), has_gates, params);
  const Tensor workspace = pass.bytes(pass.sizes.backward_workspace);
  params.phase = PT_FINISH;
  params.has_initial_state = true;
  params.begun = begun.data_ptr(), params.workspace = workspace.data_ptr();
  pass.backward(params);
  return {std::move(grads.q), std::move(grads.k), std::move(grads.v), std::move(grads.log_g)};
}

// --- autograd ----------------------------------------------------------------------------------------------------------------------------
// A node of its own and not torch::autograd::Function, which torch.func refuses.

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("powertrain::power_retention_cuda", "")
                             .typed<Forward(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                            const OptionalTensor&, const OptionalTensor&, SymInt, bool, int64_t)>();
  return op;
}

const auto& backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("powertrain::power_retention_cuda_bwd", "")
                             .typed<Backward(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                             const OptionalTensor&, SymInt, bool, bool, SymInt, int64_t)>();
  return op;
}

struct PowerRetentionBackward final : Node {
  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor result = out.unpack(getptr()), bytes = saved.unpack(), offsets = cu_seqlens.unpack();
    variable_list inputs(6);
    const bool state_used = final_state && (grads[1].defined() || grads[2].defined());
    if (!grads[0].defined() && !state_used) return inputs;
    const auto grad = [&](int i) { return grads[i].defined() ? grads[i] : input_metadata(i).zeros_like(); };
    const auto grad_of_state = [&](int i) { return state_used ? OptionalTensor(grad(i)) : std::nullopt; };
    auto [dq, dk, dv, dlog_g, dstate, dsum] =
        backward_op().call(grad(0), grad_of_state(1), grad_of_state(2), result, bytes, offsets.defined() ? OptionalTensor(offsets) : std::nullopt,
                           key_heads, has_gates, has_state, chunk_size, arch);
    inputs[0] = std::move(dq), inputs[1] = std::move(dk), inputs[2] = std::move(dv);
    if (has_gates) inputs[3] = std::move(dlog_g);
    if (has_state) inputs[4] = std::move(dstate), inputs[5] = std::move(dsum);
    return inputs;
  }
  std::string name() const override { return "PowerRetentionBackward"; }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    out.reset_data(), saved.reset_data(), cu_seqlens.reset_data();
  }
  // Compiled autograd traces apply() with stand-ins for what the node keeps.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(out, true), args.collect(saved, false), args.collect(cu_seqlens, false), args.collect(key_heads), args.collect(chunk_size);
    args.collect(arch), args.collect(has_gates), args.collect(has_state), args.collect(final_state);
  }
  variable_list apply_with_saved(const variable_list& grads, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    swap.before(out), swap.before(saved), swap.before(cu_seqlens), swap.before(key_heads), swap.before(chunk_size);
    variable_list result = apply(variable_list(grads));
    swap.after(out), swap.after(saved), swap.after(cu_seqlens), swap.after(key_heads), swap.after(chunk_size);
    return result;
  }

  SavedVariable out, saved, cu_seqlens;
  SymInt key_heads, chunk_size;
  int64_t arch = 0;
  bool has_gates = false, has_state = false, final_state = false;
};

// Nodes are held by shared_ptr in torch 2.11, by intrusive_ptr later.
template <typename T, typename Pointer = decltype(torch::autograd::Edge::function), typename... Arguments>
auto make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return std::shared_ptr<T>(new T(std::forward<Arguments>(arguments)...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(std::forward<Arguments>(arguments)...);
  }
}

template <typename... Tensors>
void refuse_forward_mode(const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(torch::autograd::isFwGradDefined(tensors) || ...),
                              "the CUDA path of power_retention has no forward-mode derivative");
}

Forward forward_autograd(c10::DispatchKeySet keys, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& log_g,
                         const OptionalTensor& state, const OptionalTensor& sum_of_keys, const OptionalTensor& cu_seqlens, SymInt chunk_size,
                         bool final_state, int64_t arch) {
  refuse_forward_mode(q, k, v, log_g, state, sum_of_keys);
  Forward result = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, q, k, v, log_g, state, sum_of_keys, cu_seqlens, chunk_size,
                                   final_state, arch);
  }();
  if (!torch::autograd::compute_requires_grad(q, k, v, log_g, state, sum_of_keys)) return result;
  const auto node = make_node<PowerRetentionBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(q, k, v, log_g, state, sum_of_keys));
  auto& [out, new_state, new_sum, saved] = result;
  torch::autograd::set_history(out, node);
  if (final_state) torch::autograd::set_history(new_state, node), torch::autograd::set_history(new_sum, node);
  node->out = SavedVariable(out, true), node->saved = SavedVariable(saved, false), node->cu_seqlens = SavedVariable(cu_seqlens, false);
  node->key_heads = k.sym_size(2), node->chunk_size = std::move(chunk_size), node->arch = arch;
  node->has_gates = log_g.has_value(), node->has_state = state.has_value(), node->final_state = final_state;
  return result;
}

Backward backward_autograd(c10::DispatchKeySet keys, const Tensor& grad_out, const OptionalTensor& grad_state, const OptionalTensor& grad_sum,
                           const Tensor& out, const Tensor& saved, const OptionalTensor& cu_seqlens, SymInt key_heads, bool has_gates,
                           bool has_state, SymInt chunk_size, int64_t arch) {
  refuse_forward_mode(grad_out, grad_state, grad_sum, out);
  Backward result = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return backward_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, grad_out, grad_state, grad_sum, out, saved, cu_seqlens, key_heads,
                                    has_gates, has_state, chunk_size, arch);
  }();
  if (!torch::autograd::compute_requires_grad(grad_out, grad_state, grad_sum, out)) return result;
  // Gradients with create_graph=True: usable, but for differentiating them again.
  const auto node = make_node<torch::autograd::NotImplemented>("the gradient of power_retention's CUDA path");
  node->set_next_edges(torch::autograd::collect_next_edges(grad_out, grad_state, grad_sum, out));
  std::apply([&](const auto&... x) { (torch::autograd::set_history(x, node), ...); }, result);
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(powertrain, Autograd, m) {
  m.impl("power_retention_cuda", forward_autograd);
  m.impl("power_retention_cuda_bwd", backward_autograd);
}

void implement(torch::Library& m) {
  m.impl("power_retention_cuda", forward);
  m.impl("power_retention_cuda_bwd", backward);
  m.impl("power_retention_cuda_final_state", final_state);
  m.impl("power_retention_cuda_finish", finish);
  m.impl("power_retention_cuda_initial_state_grad", initial_state_grad);
  m.impl("power_retention_cuda_finish_bwd", finish_bwd);
}

TORCH_LIBRARY_IMPL(powertrain, CUDA, m) { implement(m); }
TORCH_LIBRARY_IMPL(powertrain, CPU, m) { implement(m); }  // for an emulated library

}  // namespace powertrain

extern "C" __attribute__((visibility("default"))) void powertrain_attach(decltype(&pt_forward) forward, decltype(&pt_backward) backward,
                                                                         decltype(&pt_pass_sizes_of) pass_sizes_of,
                                                                         decltype(&pt_last_error) last_error, int emulated) {
  powertrain::library = {forward, backward, pass_sizes_of, last_error, emulated != 0};
}
