// The module flashpo._C: every kernel of ops.h, and the name of the instruction set that was chosen for this CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cuda_library.h"
#include "decode_layer.h"
#include "decode_plan.h"
#include "ops.h"
#include "policy_table.h"
#include "tensor_caster.h"

namespace py = pybind11;
using namespace flashpo;

namespace {

enum class Isa { baseline, avx2, avx512, avx512bf16, amx };
constexpr const char* NAMES[] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};

#if defined(FLASHPO_AMX) && !defined(FLASHPO_EMULATE)
// The system lets a process use the AMX registers only after it has asked for them.
bool may_use_tiles() {
#ifdef __linux__
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

// The instruction sets that run on this CPU, from the least to the best. Emulated ones run everywhere and are never
// the best.
std::vector<Isa> isas_of_this_cpu() {
  std::vector<Isa> isas{Isa::baseline};
#ifdef FLASHPO_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) isas.push_back(Isa::avx2);
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) isas.push_back(Isa::avx512);
#ifndef FLASHPO_EMULATE
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512bf16) isas.push_back(Isa::avx512bf16);
#ifdef FLASHPO_AMX
  if (avx512bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles())
    isas.push_back(Isa::amx);
#endif
#endif
#endif
#ifdef FLASHPO_EMULATE
  isas.insert(isas.begin(), {Isa::avx512bf16, Isa::amx});
#endif
  return isas;
}

std::vector<std::string> names_of(const std::vector<Isa>& isas) {
  std::vector<std::string> names;
  for (const Isa isa : isas) names.emplace_back(NAMES[static_cast<int>(isa)]);
  return names;
}

// Choose the best set. FLASHPO_ISA asks for another one (for tests); a set that cannot run raises an error.
Isa choose_isa(const std::vector<Isa>& isas) {
  const char* wanted = std::getenv("FLASHPO_ISA");
  if (wanted == nullptr || *wanted == 0) return isas.back();
  std::string message = "FLASHPO_ISA=" + std::string(wanted) + " cannot run here: this CPU and build have";
  for (const Isa isa : isas) {
    const std::string name = NAMES[static_cast<int>(isa)];
    if (name == wanted) return isa;
    message += " " + name;
  }
  throw std::invalid_argument(message);
}

template <typename F>
F pick(Isa isa, F baseline_form, F avx2_form, F avx512_form) {
#ifdef FLASHPO_EMULATE
  if (isa >= Isa::avx512bf16) return baseline_form;  // the CPU may not have AVX-512
#endif
  return isa >= Isa::avx512 ? avx512_form : isa == Isa::avx2 ? avx2_form : baseline_form;
}

// A kernel of the CUDA library, which may be loaded later than this module.
template <typename... Args>
auto on_cuda(void (*CudaKernels::*kernel)(Args...)) {
  return [kernel](Args... args) { (cuda_kernels().*kernel)(args...); };
}

}  // namespace

#ifdef FLASHPO_X86
#define CPU(f) pick(isa, &baseline::f, &avx2::f, &avx512::f)
#else
#define CPU(f) (&baseline::f)
#endif
#if defined(FLASHPO_AMX)
#define CPU_OR_PAIRS(f) (isa == Isa::amx ? &amx::f : isa == Isa::avx512bf16 ? &avx512bf16::f : CPU(f))
#elif defined(FLASHPO_X86)
#define CPU_OR_PAIRS(f) (isa == Isa::avx512bf16 ? &avx512bf16::f : CPU(f))
#else
#define CPU_OR_PAIRS(f) CPU(f)
#endif

PYBIND11_MODULE(_C, m) {
  TorchExchange::instance().load();
  const std::vector<Isa> isas = isas_of_this_cpu();
  const Isa isa = choose_isa(isas);
  m.attr("isa") = NAMES[static_cast<int>(isa)];
  m.attr("isas") = py::tuple(py::cast(names_of(isas)));
  using Names = std::map<std::string, std::string>;
  m.attr("policy_choices") = Names{
      {"ratio", names_of(Ratio{})}, {"surrogate", names_of(Surrogate{})}, {"kl", names_of(Kl{})},
      {"importance", names_of(Importance{})}, {"aggregation", names_of(Aggregation{})},
      {"empty_sequences", names_of(Empty{})}, {"entropy_mean", names_of(EntropyMean{})}};
  m.attr("policy_numbers") = names_of(Number{});
  m.attr("policy_stats") = py::make_tuple(stat::SUM_NAMES, stat::EXTREME_NAMES);
  m.attr("log_ratio_edges") = py::tuple(py::cast(std::vector<float>(std::begin(EDGES), std::end(EDGES))));

  // Released after the casters have run, because they need the GIL
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  m.def("selective_log_softmax_fwd", CPU(selective_log_softmax_fwd), ReleaseGil());
  m.def("selective_log_softmax_bwd", CPU(selective_log_softmax_bwd), ReleaseGil());
  m.def("linear_divergence_fold", CPU(linear_divergence_fold), ReleaseGil());
  m.def("linear_divergence_finish", CPU(linear_divergence_finish), ReleaseGil());
  m.def("linear_divergence_mixture", CPU(linear_divergence_mixture), ReleaseGil());
  m.def("linear_divergence_grad", CPU(linear_divergence_grad), ReleaseGil());
  m.def("linear_logprob_fold", CPU(linear_logprob_fold), ReleaseGil());
  m.def("linear_logprob_finish", CPU(linear_logprob_finish), ReleaseGil());
  m.def("linear_logprob_grad", CPU(linear_logprob_grad), ReleaseGil());
  m.def("gae_fwd", CPU(gae_fwd), ReleaseGil());
  m.def("gae_whiten", CPU(gae_whiten), ReleaseGil());
  m.def("policy_loss_fwd", CPU(policy_loss_fwd), ReleaseGil());
  m.def("policy_loss_bwd", CPU(policy_loss_bwd), ReleaseGil());
  m.def("add_rms_norm", CPU(add_rms_norm), ReleaseGil());
  m.def("rope_append", CPU(rope_append), ReleaseGil());
  m.def("gated_activation", CPU(gated_activation), ReleaseGil());
  m.def("sample", CPU(sample), ReleaseGil());
  m.def("tree_attention_fwd", CPU_OR_PAIRS(tree_attention_fwd), ReleaseGil());
  m.def("tree_attention_bwd", CPU_OR_PAIRS(tree_attention_bwd), ReleaseGil());
  m.def("tree_attention_scratch", CPU_OR_PAIRS(tree_attention_scratch), ReleaseGil());
  m.def("tree_recurrence_fwd", CPU(tree_recurrence_fwd), ReleaseGil());
  m.def("tree_recurrence_bwd", CPU(tree_recurrence_bwd), ReleaseGil());
  m.def("tree_recurrence_scratch", CPU(tree_recurrence_scratch), ReleaseGil());
  m.def("recurrence_step", CPU(recurrence_step), ReleaseGil());
  m.def("tree_conv_fwd", CPU(tree_conv_fwd), ReleaseGil());
  m.def("tree_conv_bwd", CPU(tree_conv_bwd), ReleaseGil());
  py::class_<decode::Plan>(m, "DecodePlan")
      .def(py::init<const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t,
                    int64_t, int64_t, int>(),
           ReleaseGil());
  m.def("decode_attention_scratch", CPU_OR_PAIRS(decode_attention_scratch));
  m.def("decode_attention", CPU_OR_PAIRS(decode_attention), ReleaseGil());
  m.def("pack_linear", CPU(pack_linear), ReleaseGil());
  m.def("packed_linear", CPU_OR_PAIRS(packed_linear), ReleaseGil());
  const LayerKernels layer{CPU(add_rms_norm), CPU_OR_PAIRS(packed_linear), CPU(rope_append),
                           CPU_OR_PAIRS(decode_attention), CPU(gated_activation)};
  m.def(
      "decode_layers",
      [layer](const Tensor& x, const Tensor& residual, std::vector<Tensor> norms, std::vector<double> eps,
              std::vector<Tensor> linears, std::vector<Tensor> biases, const Tensor& cos, const Tensor& sin,
              std::vector<Tensor> k_caches, std::vector<Tensor> v_caches, const Tensor& slot,
              std::vector<const decode::Plan*> plans, double scale, int activation, const Tensor& out,
              const Tensor& total, const Tensor& work, const Tensor& lse, const Tensor& scratch, int threads) {
        const LayerStack stack{std::move(norms),    std::move(linears), std::move(biases), std::move(k_caches),
                               std::move(v_caches), std::move(eps),     std::move(plans)};
        decode_layers(layer, stack, x, residual, cos, sin, slot, scale, activation, out, total, work, lse, scratch,
                      threads);
      },
      ReleaseGil());
  m.def("kv_append", &kv_append, ReleaseGil());
  m.def("merge_partials", &merge_partials, ReleaseGil());
  m.def("group_advantages", &group_advantages, ReleaseGil());
  m.def("group_advantages_scratch", &group_advantages_scratch);

  m.def("load_cuda_library", [](const char* path) { return load_cuda_library(path).architecture; });
  m.def("gae_fwd_cuda", on_cuda(&CudaKernels::gae_fwd), ReleaseGil());
  m.def("gae_whiten_cuda", on_cuda(&CudaKernels::gae_whiten), ReleaseGil());
  m.def("sample_cuda", on_cuda(&CudaKernels::sample), ReleaseGil());
}
