// group_advantages: the checks, and a team of one thread. A batch has thousands of rows, not millions, and a hash table
// gains nothing from vector instructions. So this is plain scalar code, compiled once.
#include "../group_advantages.h"

#include "../cuda_library.h"

namespace flashpo {
namespace {

struct Alone {
  static constexpr bool IN_ORDER = true;  // the only thread takes the rows from first to last
  int64_t rank() const { return 0; }
  int64_t size() const { return 1; }
  void wait() const {}
  int32_t claim(int32_t* slot, int32_t row) const {
    const int32_t found = *slot;
    if (found == advantages::FREE) *slot = row;
    return found;
  }
  int32_t count(int32_t* n) const { return (*n)++; }
  template <typename T>
  void add(T* sum, T x) const {
    *sum += x;
  }
  void lower(int32_t* least, int32_t x) const { *least = x < *least ? x : *least; }
  void raise(int32_t* most, int32_t x) const { *most = x > *most ? x : *most; }
  void require(bool fine, const char* message) const {
    if (!fine) expect(false, message);
  }
};

int64_t table_size(int64_t rows) {
  int64_t size = 1;
  while (size < 2 * rows) size *= 2;
  return size;
}

int64_t group_words(int64_t rows, int64_t columns) { return (rows * columns + 1) * sizeof(advantages::Group) / 8; }

}  // namespace

int64_t group_advantages_scratch(int64_t rows, int64_t columns) {
  return group_words(rows, columns) + (2 * rows + 1 + table_size(rows) + 1) / 2;
}

void group_advantages(const Tensor& rewards, const Tensor& group, const Tensor& lengths,
                      const std::vector<double>& reward_weights, int baseline, int scale, bool normalize_first,
                      double eps, bool raw_singletons, const Tensor& advantage, const Tensor& mean, const Tensor& std,
                      const Tensor& degenerate, const Tensor& scratch, int64_t stream) {
  const DLDeviceType device = rewards.dl.device.device_type;
  expect(rewards.dim() == 2, "rewards must be (B, K)");
  advantages::Problem p{};
  p.rows = rewards.size(0);
  p.functions = rewards.size(1);
  const int64_t columns = normalize_first ? p.functions : 1;
  expect(p.rows < (1 << 30) && p.functions >= 1 && p.functions <= advantages::MAX_FUNCTIONS, "rewards: too large");
  expect(static_cast<int64_t>(reward_weights.size()) == p.functions, "reward_weights must have one for each function");
  expect_dense("rewards", rewards, DType::f32, {p.rows, p.functions}, false, device);
  expect_dense("group", group, DType::i64, {p.rows}, false, device);
  expect_dense("lengths", lengths, DType::i64, {p.rows}, true, device);
  for (const Tensor* out : {&advantage, &mean, &std})
    expect_dense("out", *out, DType::f32, {p.rows}, false, device);
  expect_dense("degenerate", degenerate, DType::boolean, {p.rows}, false, device);
  expect_dense("scratch", scratch, DType::i64, {group_advantages_scratch(p.rows, columns)}, false, device);
  if (p.rows == 0) return;

  p.rewards = rewards.data<const float>();
  p.group = group.data<const int64_t>();
  p.lengths = lengths.data<const int64_t>();
  for (int64_t k = 0; k < p.functions; ++k) p.reward_weights[k] = reward_weights[k];
  p.baseline = static_cast<advantages::Baseline>(baseline);
  p.scale = static_cast<advantages::Scale>(scale);
  p.eps = eps;
  p.raw_singletons = raw_singletons;
  p.advantage = advantage.data<float>();
  p.mean = mean.data<float>();
  p.std = std.data<float>();
  p.degenerate = degenerate.data<bool>();
  p.capacity = table_size(p.rows);
  p.batch = scratch.data<advantages::Group>();
  p.groups = p.batch + 1;
  p.found = scratch.data<int32_t>() + 2 * group_words(p.rows, columns);
  p.id = p.found + 1;
  p.number = p.id + p.rows;
  p.table = p.number + p.rows;
  if (device == kDLCUDA) return cuda_kernels().group_advantages(p, normalize_first, stream);
  expect(device == kDLCPU, "rewards: no native kernel for this device");
  if (normalize_first) advantages::Run<Alone, true>{p, {}}();
  else advantages::Run<Alone, false>{p, {}}();
}

}  // namespace flashpo
