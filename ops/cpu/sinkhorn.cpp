#include "common.h"

// sinkhorn for fp32: the mathematics and shapes of ops/sinkhorn.py, a matrix at a time.

constexpr int MAX_STREAMS = 16;

// N: n, if it is known at compile time, or 0
template <int N>
static void normalize(const float* logits, float* out, int64_t matrices, int64_t given_n,
                      int64_t iters, float eps) {
  constexpr int SIZE = N ? N : MAX_STREAMS;
  const int64_t n = N ? N : given_n;
  for (int64_t m = 0; m < matrices; m++, logits += n * n, out += n * n) {
    float c[SIZE][SIZE], sum[SIZE];
    // c = softmax of rows + eps
    for (int i = 0; i < n; i++) {
      const float* row = logits + i * n;
      float max = row[0], total = 0;
      for (int j = 1; j < n; j++) max = std::max(max, row[j]);
      for (int j = 0; j < n; j++) {
        c[i][j] = std::exp(row[j] - max);
        total += c[i][j];
      }
      for (int j = 0; j < n; j++) c[i][j] = c[i][j] / total + eps;
    }
    // Columns, rows, columns ..: c = c / (sum + eps)
    for (int64_t step = 0; step < 2 * iters - 1; step++) {
      const bool columns = step % 2 == 0;
      for (int i = 0; i < n; i++) sum[i] = eps;
      for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) sum[columns ? j : i] += c[i][j];
      for (int i = 0; i < n; i++) sum[i] = 1 / sum[i];
      for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) c[i][j] *= sum[columns ? j : i];
    }
    for (int i = 0; i < n; i++)
      for (int j = 0; j < n; j++) out[i * n + j] = c[i][j];
  }
}

Tensor sinkhorn(const Tensor& logits_, double eps, int64_t iters) {
  const Tensor logits = floats(logits_), out = torch::stable::empty_like(logits);
  const int64_t n = logits.size(-1), matrices = logits.numel() / (n * n);
  const auto run = n == 4 ? normalize<4> : normalize<0>;
  run(data(logits), data(out), matrices, n, iters, eps);
  return out;
}
