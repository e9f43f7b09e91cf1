#pragma once
// Shared by the kernels: vectors of 8 floats, a matrix product, threads and their sums.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---------------------------------------------------------------------------------------------
// Tensors

static inline Tensor contiguous(const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype,
                  "this CPU kernel takes float32 values and int64 indices");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
static inline Tensor floats(const Tensor& t) { return contiguous(t, ScalarType::Float); }
static inline Tensor indices(const Tensor& t) { return contiguous(t, ScalarType::Long); }
static inline float* data(const Tensor& t) { return (float*)t.data_ptr(); }
static inline int64_t* int_data(const Tensor& t) { return (int64_t*)t.data_ptr(); }

// Scratch memory for n values, uninitialized
static inline float* ensure_size(std::vector<float>& v, int64_t n) {
  if ((int64_t)v.size() < n) v.resize(n);
  return v.data();
}

// ---------------------------------------------------------------------------------------------
// Vectors of 8 floats

typedef float Vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Int32x8 __attribute__((vector_size(32), aligned(4), may_alias));

// The vector at x. (Vec8 is no argument of templates: they drop its alignment, and expect 32.)
static inline Vec8& vec(float* x) { return *(Vec8*)x; }
static inline const Vec8& vec(const float* x) { return *(const Vec8*)x; }

// ---------------------------------------------------------------------------------------------
// Matrix product, in the thread that calls it: for the odd sizes of experts and of visible keys,
// where it is faster than the library's

struct Matrix {
  const float* data;
  int64_t rows, cols, row_stride, col_stride = 1;
  Matrix T() const { return {data, cols, rows, col_stride, row_stride}; }
};

constexpr int64_t TILE_ROWS = 6, TILE_COLS = 16;  // 12 vectors of sums, which registers hold

// Rows of a in groups of TILE_ROWS: group_stride apart, and row_stride from row to row in one
struct RowGroups {
  const float* data;
  int64_t rows, row_stride, col_stride, group_stride;
  explicit RowGroups(const Matrix& a)
      : data(a.data),
        rows(a.rows),
        row_stride(a.row_stride),
        col_stride(a.col_stride),
        group_stride(TILE_ROWS * a.row_stride) {}
};

// R rows and 8 V columns of c, = or += a [R, K] b, where b is packed [K, TILE_COLS]
template <int R, int V>
static void multiply_tile(const float* a, int64_t row_stride, int64_t col_stride, const float* b,
                          float* c, int64_t c_stride, int64_t K, bool add) {
  Vec8 sum[R][V] = {};
  if (add) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sum[r][v] = vec(c + r * c_stride + 8 * v);
  }
  for (int64_t k = 0; k < K; k++) {
    const Vec8 left = vec(b + TILE_COLS * k), right = vec(b + TILE_COLS * k + 8 * (V - 1));
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const float value = a[r * row_stride + k * col_stride];
      sum[r][0] += value * left;
      if (V > 1) sum[r][V - 1] += value * right;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) vec(c + r * c_stride + 8 * v) = sum[r][v];
}

// As multiply_tile, with a number of rows that is not known at compile time
template <int V>
static void multiply_rows(int64_t rows, const float* a, int64_t row_stride, int64_t col_stride,
                          const float* b, float* c, int64_t c_stride, int64_t K, bool add) {
  const auto multiply = rows == 1   ? multiply_tile<1, V>
                        : rows == 2 ? multiply_tile<2, V>
                        : rows == 3 ? multiply_tile<3, V>
                        : rows == 4 ? multiply_tile<4, V>
                        : rows == 5 ? multiply_tile<5, V>
                                    : multiply_tile<6, V>;
  multiply(a, row_stride, col_stride, b, c, c_stride, K, add);
}

// Up to TILE_COLS columns of c (rows c_stride apart), = or += a b, where b is packed [K, TILE_COLS]
static inline void multiply_columns(const RowGroups& a, const float* b, float* c, int64_t c_stride,
                                    int64_t columns, int64_t K, bool add) {
  const bool whole = columns >= TILE_COLS || columns == 8;
  float edge[TILE_ROWS * TILE_COLS];  // in place of c, where a tile would write beyond its columns
  for (int64_t m = 0; m < a.rows; m += TILE_ROWS) {
    const int64_t rows = std::min(TILE_ROWS, a.rows - m);
    const float* a_m = a.data + m / TILE_ROWS * a.group_stride;
    float* c_m = c + m * c_stride;
    float* to = whole ? c_m : edge;
    const int64_t stride = whole ? c_stride : TILE_COLS, bytes = columns * sizeof(float);
    for (int64_t r = 0; !whole && add && r < rows; r++)
      std::memcpy(edge + TILE_COLS * r, c_m + r * c_stride, bytes);
    if (columns <= 8) {
      multiply_rows<1>(rows, a_m, a.row_stride, a.col_stride, b, to, stride, K, add);
    } else {
      multiply_rows<2>(rows, a_m, a.row_stride, a.col_stride, b, to, stride, K, add);
    }
    for (int64_t r = 0; !whole && r < rows; r++)
      std::memcpy(c_m + r * c_stride, edge + TILE_COLS * r, bytes);
  }
}

// 8 rows of 8, row_stride apart -> their transpose, in rows to_stride apart
static inline void transpose8(const float* from, int64_t row_stride, float* to,
                              int64_t to_stride) {
  Vec8 r[8], s[8];
  for (int i = 0; i < 8; i++) r[i] = vec(from + i * row_stride);
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < 4; i++) {
      s[2 * i] = __builtin_shufflevector(r[i], r[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      s[2 * i + 1] = __builtin_shufflevector(r[i], r[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    std::memcpy(r, s, sizeof r);
  }
  for (int i = 0; i < 8; i++) vec(to + to_stride * i) = r[i];
}

// Columns n .. n + TILE_COLS of b [K, N] as [K, TILE_COLS], with zeros beyond the last. Those
// that come next are fetched into the second cache
static inline void pack_columns(const Matrix& b, int64_t n, float* packed) {
  const int64_t K = b.rows, columns = std::min(TILE_COLS, b.cols - n);
  const float *from = b.data + n * b.col_stride, *next = from + TILE_COLS * b.col_stride;
  int64_t k = 0;
  if (columns == TILE_COLS && b.col_stride == 1) {
    for (; k < K; k++) {
      std::memcpy(packed + TILE_COLS * k, from + k * b.row_stride, TILE_COLS * sizeof(float));
      __builtin_prefetch(next + k * b.row_stride, 0, 2);
    }
  } else if (columns == TILE_COLS && b.row_stride == 1) {
    for (; k + 8 <= K; k += 8) {
      for (int j = 0; j < TILE_COLS; j += 8)
        transpose8(from + k + j * b.col_stride, b.col_stride, packed + TILE_COLS * k + j,
                   TILE_COLS);
      for (int j = 0; j < TILE_COLS && k % 16 == 0; j++)
        __builtin_prefetch(next + k + j * b.col_stride, 0, 2);
    }
  }
  for (; k < K; k++)
    for (int64_t j = 0; j < TILE_COLS; j++)
      packed[TILE_COLS * k + j] = j < columns ? from[k * b.row_stride + j * b.col_stride] : 0;
}

// Groups of rows of a transposed matrix, each stored as [K, TILE_ROWS]: the columns of a, far
// apart, would share few sets of the cache, and each tile reads them again
static inline RowGroups pack_rows(const Matrix& a, std::vector<float>& memory) {
  const int64_t K = a.cols, groups = (a.rows + TILE_ROWS - 1) / TILE_ROWS;
  float* to = ensure_size(memory, groups * TILE_ROWS * K);
  for (int64_t m = 0; m < a.rows; m += TILE_ROWS) {
    const int64_t rows = std::min(TILE_ROWS, a.rows - m);
    for (int64_t k = 0; k < K; k++) {
      const float* from = a.data + m + k * a.col_stride;
      float* out = to + m * K + TILE_ROWS * k;
      if (rows == TILE_ROWS) {
        std::memcpy(out, from, TILE_ROWS * sizeof(float));
      } else {
        std::memcpy(out, from, rows * sizeof(float));
      }
    }
  }
  RowGroups packed({to, a.rows, K, 1, TILE_ROWS});
  packed.group_stride = TILE_ROWS * K;
  return packed;
}

// c [M, N] (rows c_stride apart) = a [M, K] b [K, N], or += if add
static inline void matmul(const Matrix& a, const Matrix& b, float* c, int64_t c_stride,
                          bool add = false) {
  static thread_local std::vector<float> packed_columns, packed_rows;
  const int64_t K = a.cols, N = b.cols;
  float* packed = ensure_size(packed_columns, TILE_COLS * K);
  const bool conflicts = a.row_stride == 1 && a.col_stride % 256 == 0;
  const bool repack = conflicts && a.rows > TILE_ROWS && N > 2 * TILE_COLS;
  const RowGroups rows = repack ? pack_rows(a, packed_rows) : RowGroups(a);
  for (int64_t n = 0; n < N; n += TILE_COLS) {
    pack_columns(b, n, packed);
    multiply_columns(rows, packed, c + n, c_stride, N - n, K, add);
  }
}

// ---------------------------------------------------------------------------------------------
// Elementwise

static inline float sum_lanes(Vec8 v) {
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

static inline float dot(const float* x, const float* y, int64_t n) {
  Vec8 sum[4] = {};  // one alone would wait for itself
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sum[j] += vec(x + i + 8 * j) * vec(y + i + 8 * j);
  for (; i + 8 <= n; i += 8) sum[0] += vec(x + i) * vec(y + i);
  float result = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < n; i++) result += x[i] * y[i];
  return result;
}

// f(at) for whole vectors of the elements 0 .. n, then for the elements left over: at(x) is a
// reference to those of x. By hand, as Inductor's flags turn the compiler's vectorizer off.
struct AtVector {
  int64_t i;
  Vec8& operator()(float* x) const { return vec(x + i); }
  const Vec8& operator()(const float* x) const { return vec(x + i); }
};
struct AtElement {
  int64_t i;
  template <class T>
  T& operator()(T* x) const {
    return x[i];
  }
};
template <class F>
static void vectorize(int64_t n, F f) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) f(AtVector{i});
  for (; i < n; i++) f(AtElement{i});
}

// y += a x
static inline void add_scaled(float* y, float a, const float* x, int64_t n) {
  vectorize(n, [&](auto at) { at(y) += a * at(x); });
}

// e^x to a relative 1e-7 (Cephes' expf: a power of two times a polynomial); 0 where that is
// subnormal
static inline Vec8 exp8(Vec8 x) {
  const Vec8 low = Vec8{} - 87.3f, high = Vec8{} + 88.3f, zero = {};
  Vec8 v = x < low ? low : x;
  v = v > high ? high : v;
  const Vec8 n = (v * 1.44269504f + 12582912.f) - 12582912.f;  // x / ln 2, rounded
  const Vec8 r = (v - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2
  Vec8 y = 1.9875691500e-4f * r + 1.3981999507e-3f;
  for (float next : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = y * r + next;
  y = y * r * r + r + 1;
  const Int32x8 power = (__builtin_convertvector(n, Int32x8) + 127) << 23;
  return x < low ? zero : y * (Vec8)power;
}

static inline Vec8 sigmoid8(Vec8 x) { return 1 / (1 + exp8(-x)); }

// ---------------------------------------------------------------------------------------------
// Threads

// Into how many parts, which run at the same time, in_parts divides so many items
static inline int64_t count_parts(int64_t items) {
  return std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), items));
}

// f(part, begin, end) for ranges that cover 0 .. items
template <class F>
static void in_parts(int64_t items, F f) {
  const int64_t parts = count_parts(items);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) f(p, items * p / parts, items * (p + 1) / parts);
  });
}

// A sum that parts add to at the same time, each in a slice of its own: that of part 0 is the
// result itself
struct Partials {
  std::vector<std::vector<float>> others;
  float* result;
  int64_t n;
  Partials(const Tensor& t, int64_t parts) : others(parts - 1), result(data(t)), n(t.numel()) {
    std::fill(result, result + n, 0.f);
  }
  float* slice(int64_t part) {
    if (part == 0) return result;
    std::vector<float>& other = others[part - 1];
    if (other.empty()) other.assign(n, 0.f);
    return other.data();
  }
  void reduce() {
    for (const auto& other : others)
      if (!other.empty()) add_scaled(result, 1, other.data(), n);
  }
};
