// merge_partials on the CPU: parts of the vocabulary (S, R, N) into logprob, entropy and lse. It takes a few operations
// per token, so it is plain scalar code, compiled once.
#include <algorithm>
#include <cmath>

#include "../ops.h"
#include "online.h"

namespace flashpo {

using namespace FLASHPO_ISA;

void merge_partials(const Tensor& partials, int64_t vocab, const Tensor& out) {
  expect(partials.dim() == 3, "partials must be (S, R, N)");
  const int64_t parts = partials.size(0), rows = partials.size(1), n = partials.size(2);
  expect(rows == ROWS || rows == 4, "partials must have 4 or 8 rows");
  expect_dense("partials", partials, DType::f32, {parts, rows, n});
  expect_dense("out", out, DType::f32, {rows == ROWS ? RESULTS : 4, n});
  const auto result = [&](Result r, int64_t i) -> float& { return out.data<float>()[r * n + i]; };
  for (int64_t i = 0; i < n; ++i) {
    const auto at = [&](int64_t s, Row r) { return partials.data<const float>()[(s * rows + r) * n + i]; };
    float ref = LOWEST;
    for (int64_t s = 0; s < parts; ++s) ref = std::max(ref, at(s, REF));
    float sum = 0, wsum = 0, sqsum = 0, ysum = 0, target = -INFINITY, before = -INFINITY, top = -INFINITY;
    for (int64_t s = 0; s < parts; ++s) {
      const float shift = std::max(std::max(at(s, REF), LOWEST) - ref, LOWEST);
      const float scale = std::exp2(shift);
      sum += at(s, SUM) * scale;
      wsum += (at(s, WSUM) + shift * at(s, SUM)) * scale;
      target = std::max(target, at(s, TARGET) + shift);
      if (rows == 4) continue;
      sqsum += at(s, SQSUM) * scale * scale;
      ysum += at(s, YSUM);
      before = std::max(before, at(s, BEFORE) + shift);
      top = std::max(top, at(s, MAX) + shift);
    }
    const float bits = std::log2(sum);
    result(LOGPROB, i) = (target - bits) * LN2;
    result(ENTROPY, i) = (bits - wsum / sum) * LN2;
    result(LOG_Z, i) = ref;
    result(LOG_Z_REST, i) = bits;
    if (rows == 4) continue;
    result(LOG_SUM_SQ_PROBS, i) = (std::log2(sqsum) - 2 * bits) * LN2;
    result(MEAN_LOGIT, i) = ysum * (LN2 / vocab);
    result(IS_TOP1, i) = target >= top && target > before;
  }
}

}  // namespace flashpo
