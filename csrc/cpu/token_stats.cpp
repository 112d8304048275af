// merge_partials on the CPU: (S, R, N) parts of the vocabulary into logprob, entropy and lse. A few operations a
// token, so plain scalar code, compiled once.
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
  expect_dense("out", out, DType::f32, {rows == ROWS ? 6 : 3, n});
  float* o = out.data<float>();
  for (int64_t i = 0; i < n; ++i) {
    const auto at = [&](int64_t s, Row r) { return partials.data<const float>()[(s * rows + r) * n + i]; };
    float ref = LOWEST, target = -INFINITY;
    for (int64_t s = 0; s < parts; ++s) {
      ref = std::max(ref, at(s, REF));
      target = std::max(target, at(s, TARGET));
    }
    float sum = 0, wsum = 0, sqsum = 0, ysum = 0, before = -INFINITY, top = -INFINITY;
    for (int64_t s = 0; s < parts; ++s) {
      const float shift = std::max(std::max(at(s, REF), LOWEST) - ref, NOTHING);
      const float scale = shift == NOTHING ? 0.0f : std::exp2(shift);
      sum += at(s, SUM) * scale;
      wsum += (at(s, WSUM) + shift * at(s, SUM)) * scale;
      if (rows == 4) continue;
      sqsum += at(s, SQSUM) * scale * scale;
      ysum += at(s, YSUM);
      before = std::max(before, at(s, BEFORE));
      top = std::max(top, at(s, MAX));
    }
    const float bits = std::log2(sum);
    o[i] = ((target - ref) - bits) * LN2;
    o[n + i] = (bits - wsum / sum) * LN2;
    o[2 * n + i] = (ref + bits) * LN2;
    if (rows == 4) continue;
    o[3 * n + i] = (std::log2(sqsum) - 2 * bits) * LN2;
    o[4 * n + i] = ysum * (LN2 / vocab);
    o[5 * n + i] = target >= top && target > before;
  }
}

}  // namespace flashpo
