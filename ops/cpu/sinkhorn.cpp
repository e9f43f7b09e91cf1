#include "common.h"

template <int N> void run(const float* in, float* out, int64_t matrices, int64_t iters, float eps, int64_t given) {
  const int64_t n = N ? N : given;  // N = 0: not known at compile time
  for (int64_t m = 0; m < matrices; m++, in += n * n, out += n * n) {
    float c[N ? N : 16][N ? N : 16], sum[N ? N : 16];
    for (int i = 0; i < n; i++) {
      float top = in[i * n], total = 0;
      for (int j = 1; j < n; j++) top = std::max(top, in[i * n + j]);
      for (int j = 0; j < n; j++) total += c[i][j] = std::exp(in[i * n + j] - top);
      for (int j = 0; j < n; j++) c[i][j] = c[i][j] / total + eps;
    }
    for (int64_t step = 0; step < 2 * iters - 1; step++) {
      const bool columns = step % 2 == 0;
      for (int i = 0; i < n; i++) sum[i] = eps;
      for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) sum[columns ? j : i] += c[i][j];
      for (int i = 0; i < n; i++) sum[i] = 1 / sum[i];
      for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) c[i][j] *= sum[columns ? j : i];
    }
    for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) out[i * n + j] = c[i][j];
  }
}

Tensor sinkhorn(const Tensor& logits, double eps, int64_t iters) {
  const Tensor in = floats(logits), out = torch::stable::empty_like(in);
  const int64_t n = in.size(-1);
  (n == 4 ? run<4> : run<0>)((const float*)in.data_ptr(), (float*)out.data_ptr(), in.numel() / (n * n), iters, eps, n);
  return out;
}
