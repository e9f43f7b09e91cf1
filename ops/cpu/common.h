#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

static Tensor packed(const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "this CPU kernel takes float32 values and int64 indices");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
static Tensor floats(const Tensor& t) { return packed(t, ScalarType::Float); }
static float* data(const Tensor& t) { return (float*)t.data_ptr(); }

typedef float Vec8 __attribute__((vector_size(32), aligned(4), may_alias));
// Not an argument of templates: they drop its alignment, and expect 32
static Vec8& vec(float* x) { return *(Vec8*)x; }
static const Vec8& vec(const float* x) { return *(const Vec8*)x; }
typedef int32_t Int8 __attribute__((vector_size(32), aligned(4), may_alias));

// Memory for n values, with whatever is in it
static float* room(std::vector<float>& v, int64_t n) {
  if ((int64_t)v.size() < n) v.resize(n);
  return v.data();
}

// Element (i, j) is at[i row + j col]; if far is given, row i is at i far for every sixth, and the five after it row apart
struct Matrix {
  const float* at;
  int64_t row, col, far = 0;
  const float* sixth(int64_t i) const { return at + i * (far ? far : row); }
};

// R rows of c, 8 V columns: c = or += a b, with b packed [K, 16]
template <int R, int V> static void tile(const float* a, int64_t row, int64_t col, const float* b, float* c, int64_t stride, int64_t K, bool add) {
  Vec8 sum[R][V] = {};
#pragma GCC unroll 6
  for (int r = 0; add && r < R; r++) for (int i = 0; i < V; i++) sum[r][i] = vec(c + r * stride + 8 * i);
  for (int64_t k = 0; k < K; k++) {
    const Vec8 left = vec(b + 16 * k), right = vec(b + 16 * k + 8 * (V - 1));
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const float v = a[r * row + k * col];
      sum[r][0] += v * left;
      if (V > 1) sum[r][V - 1] += v * right;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) for (int i = 0; i < V; i++) vec(c + r * stride + 8 * i) = sum[r][i];
}

template <int V> static void tiles(Matrix a, const float* b, float* c, int64_t stride, int64_t M, int64_t K, bool add) {
  for (int64_t m = 0; m < M; m += 6) {
    const float* in = a.sixth(m);
    float* out = c + m * stride;
    switch (M - m) {
      case 1: tile<1, V>(in, a.row, a.col, b, out, stride, K, add); break;
      case 2: tile<2, V>(in, a.row, a.col, b, out, stride, K, add); break;
      case 3: tile<3, V>(in, a.row, a.col, b, out, stride, K, add); break;
      case 4: tile<4, V>(in, a.row, a.col, b, out, stride, K, add); break;
      case 5: tile<5, V>(in, a.row, a.col, b, out, stride, K, add); break;
      default: tile<6, V>(in, a.row, a.col, b, out, stride, K, add);
    }
  }
}

// 8 rows of 8 -> 8 columns, in rows `step` apart
static void transpose(const float* from, int64_t stride, float* to, int64_t step) {
  Vec8 r[8], s[8];
  for (int i = 0; i < 8; i++) r[i] = vec(from + i * stride);
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < 4; i++) {
      s[2 * i] = __builtin_shufflevector(r[i], r[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      s[2 * i + 1] = __builtin_shufflevector(r[i], r[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    std::memcpy(r, s, sizeof r);
  }
  for (int i = 0; i < 8; i++) vec(to + step * i) = r[i];
}

// Columns n .. n + 16 of b [K, N] as [K, 16], with zeros beyond the last. The next sixteen are fetched into the second cache
static void pack(Matrix b, int64_t n, int64_t N, int64_t K, float* p) {
  const int64_t width = std::min<int64_t>(16, N - n);
  const float *from = b.at + n * b.col, *next = from + 16 * b.col;
  int64_t k = 0;
  if (width == 16 && b.col == 1) for (; k < K; k++) std::memcpy(p + 16 * k, from + k * b.row, 64), __builtin_prefetch(next + k * b.row, 0, 2);
  if (width == 16 && b.row == 1) for (; k + 8 <= K; k += 8) {
    for (int j = 0; j < 16; j += 8) transpose(from + k + j * b.col, b.col, p + 16 * k + j, 16);
    for (int j = 0; j < 16 && k % 16 == 0; j++) __builtin_prefetch(next + k + j * b.col, 0, 2);
  }
  for (; k < K; k++) for (int64_t j = 0; j < 16; j++) p[16 * k + j] = j < width ? from[k * b.row + j * b.col] : 0;
}

// c [M, 16 columns, or all N - n] (rows `stride` apart) = or += a [M, K] p, which pack made
static void times(Matrix a, const float* p, float* c, int64_t stride, int64_t M, int64_t n, int64_t N, int64_t K, bool add) {
  const int64_t width = N - n;
  if (width >= 16) return tiles<2>(a, p, c, stride, M, K, add);
  if (width == 8) return tiles<1>(a, p, c, stride, M, K, add);
  float edge[6 * 16];
  for (int64_t m = 0; m < M; m += 6) {
    const int64_t rows = std::min<int64_t>(6, M - m);
    for (int64_t r = 0; add && r < rows; r++) std::memcpy(edge + 16 * r, c + (m + r) * stride, 4 * width);
    (width < 8 ? tiles<1> : tiles<2>)({a.sixth(m), a.row, a.col}, p, edge, 16, rows, K, add);
    for (int64_t r = 0; r < rows; r++) std::memcpy(c + (m + r) * stride, edge + 16 * r, 4 * width);
  }
}

// c [M, N] (rows `stride` apart) = or += a [M, K] b [K, N]
static void product(Matrix a, Matrix b, float* c, int64_t stride, int64_t M, int64_t N, int64_t K, bool add) {
  static thread_local std::vector<float> panel, sixes;
  float* p = room(panel, 16 * K);
  if (a.row == 1 && a.col % 256 == 0 && M > 6 && N > 32) {  // a tile would read from few sets of the cache, again and again
    float* to = room(sixes, (M + 5) / 6 * 6 * K);
    for (int64_t m = 0; m < M; m += 6) {
      const int64_t rows = std::min<int64_t>(6, M - m);
      const float* from = a.at + m;
      for (int64_t k = 0; k < K; k++)
        if (rows == 6) std::memcpy(to + (m * K + 6 * k), from + k * a.col, 24);
        else std::memcpy(to + (m * K + 6 * k), from + k * a.col, 4 * rows);
    }
    a = {to, 1, 6, K};
  }
  for (int64_t n = 0; n < N; n += 16) pack(b, n, N, K, p), times(a, p, c + n, stride, M, n, N, K, add);
}

// b [K, N], packed once for many products
struct Packed {
  int64_t N, K;
  std::vector<float> panels;
  Packed(Matrix b, int64_t N, int64_t K) : N(N), K(K), panels((N + 15) / 16 * 16 * K) {
    for (int64_t n = 0; n < N; n += 16) pack(b, n, N, K, panels.data() + n * K);
  }
};
static void product(Matrix a, const Packed& b, float* c, int64_t stride, int64_t M, bool add) {
  for (int64_t n = 0; n < b.N; n += 16) times(a, b.panels.data() + n * b.K, c + n, stride, M, n, b.N, b.K, add);
}

static float total(Vec8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

static float dot(const float* x, const float* y, int64_t n) {
  Vec8 sum[4] = {};  // one alone would wait for itself
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sum[j] += vec(x + i + 8 * j) * vec(y + i + 8 * j);
  for (; i + 8 <= n; i += 8) sum[0] += vec(x + i) * vec(y + i);
  float rest = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < n; i++) rest += x[i] * y[i];
  return rest;
}

// f(at) for vectors of elements 0 .. n, then for those left one by one: at(x) is a reference to x's. Compilers would not: Inductor
// turns that off
struct VecAt {
  int64_t i;
  Vec8& operator()(float* x) const { return vec(x + i); }
  const Vec8& operator()(const float* x) const { return vec(x + i); }
};
struct FloatAt {
  int64_t i;
  template <class T> T& operator()(T* x) const { return x[i]; }
};
template <class F> static void each(int64_t n, F f) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) f(VecAt{i});
  for (; i < n; i++) f(FloatAt{i});
}

// y += a x
static void add_scaled(float* y, float a, const float* x, int64_t n) { each(n, [&](auto at) { at(y) += a * at(x); }); }

// e^x to a relative 1e-7; 0 where it would be subnormal
static Vec8 exponential(Vec8 x) {
  const Vec8 low = Vec8{} - 87.3f, high = Vec8{} + 88.3f, zero = {};
  const Vec8 v = x < low ? low : x > high ? high : x, n = (v * 1.44269504f + 12582912.f) - 12582912.f;
  const Vec8 r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec8 y = 1.9875691500e-4f * r + 1.3981999507e-3f;
  for (float next : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = y * r + next;
  y = y * r * r + r + 1;
  const Int8 power = (__builtin_convertvector(n, Int8) + 127) << 23;
  return x < low ? zero : y * (Vec8)power;
}

// f(part, begin, end) for ranges that cover 0 .. count; parts, at most parts_of(count), run at the same time
static int64_t parts_of(int64_t count) { return std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), count)); }
template <class F> static void in_parts(int64_t count, F f) {
  const int64_t parts = parts_of(count);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) f(p, count * p / parts, count * (p + 1) / parts);
  });
}

// What the parts added up, each in zeros of its own: part 0 in `first` itself
struct Sums {
  std::vector<std::vector<float>> others;
  float* first;
  int64_t n;
  Sums(const Tensor& t, int64_t parts) : others(parts - 1), first(data(t)), n(t.numel()) { std::fill(first, first + n, 0.f); }
  float* of(int64_t part) {
    if (!part) return first;
    if (others[part - 1].empty()) others[part - 1].assign(n, 0.f);
    return others[part - 1].data();
  }
  void finish() { for (const auto& other : others) if (!other.empty()) add_scaled(first, 1, other.data(), n); }
};
