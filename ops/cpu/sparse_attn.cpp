#include "common.h"

// sparse_attn for fp32: the mathematics and shapes of ops/sparse_attn.py. A block of tokens with
// all its heads meets the keys that any of them sees: one matrix product per direction, as in the
// reference, but only of keys in sight, and the softmax happens while the scores are in the cache.

constexpr int64_t BLOCK = 16;  // tokens

using MaybeTensor = std::optional<Tensor>;

struct Attention {
  std::vector<Tensor> held;  // contiguous
  const float *q, *kv, *sink, *cos, *sin, *entries = nullptr;
  const int64_t *window_len, *lo = nullptr, *hi = nullptr, *idx = nullptr;
  int64_t B, T, H, D, kv_len, W;
  int64_t n_entries = 0, topk = 0;
  int64_t rope_dim, blocks;  // blocks: of a row of the batch
  float eps, scale;

  Attention(const Tensor& q_, const Tensor& kv_, const Tensor& sink_, const Tensor& window_len_,
            const Tensor& cos_, const Tensor& sin_, const MaybeTensor& entries_,
            const MaybeTensor& lo_, const MaybeTensor& hi_, const MaybeTensor& idx_, double eps_) {
    q = hold(q_);
    kv = hold(kv_);
    sink = hold(sink_);
    cos = hold(cos_);
    sin = hold(sin_);
    window_len = hold_int(window_len_);
    B = q_.size(0);
    T = q_.size(1);
    H = q_.size(2);
    D = q_.size(3);
    kv_len = kv_.size(1);
    W = kv_len - T + 1;
    rope_dim = 2 * cos_.size(2);
    if (entries_) {
      entries = hold(*entries_);
      lo = hold_int(*lo_);
      hi = hold_int(*hi_);
      n_entries = entries_->size(1);
    }
    if (idx_) {
      idx = hold_int(*idx_);
      topk = idx_->size(2);
    }
    blocks = (T + BLOCK - 1) / BLOCK;
    eps = eps_;
    scale = 1 / std::sqrt((float)D);
  }
  const float* hold(const Tensor& t) {
    held.push_back(floats(t));
    return data(held.back());
  }
  const int64_t* hold_int(const Tensor& t) {
    held.push_back(indices(t));
    return int_data(held.back());
  }

  // The last rope_dim dims of the heads x [H, D] of a token (counted over the batch), rotated by
  // its angles (sign 1) or back (-1)
  void rotate(float* x, int64_t token, float sign) const {
    const int64_t pairs = rope_dim / 2;
    const float *c = cos + token * pairs, *s = sin + token * pairs;
    for (int64_t h = 0; h < H; h++) {
      for (int64_t i = 0; i < pairs; i++) {
        float* pair = x + h * D + D - rope_dim + 2 * i;
        const float a = pair[0], b = pair[1], sine = sign * s[i];
        pair[0] = a * c[i] - b * sine;
        pair[1] = a * sine + b * c[i];
      }
    }
  }
};

// Tokens t .. t + n of row b of the batch. Its rows are their heads; the columns of its scores p
// are window keys, from first_key on, then entries: those from first_entry on, which some token
// may see, or, with idx, the entries that each token chose
struct Block {
  const Attention& a;
  int64_t b, t, n, rows, first_key, keys, first_entry, entries;
  int64_t p_stride;
  std::vector<float> queries, inv_rms;  // normalized, scaled and rotated; 1 / rms of each row
  std::vector<float> p, chosen_rows, g_chosen;
  std::vector<int64_t> chosen;  // rows of the batch's entries that a token chose
  explicit Block(const Attention& a) : a(a) {}

  int64_t token(int64_t i) const { return b * a.T + t + i; }

  void start(int64_t block) {
    b = block / a.blocks;
    t = block % a.blocks * BLOCK;
    n = std::min(BLOCK, a.T - t);
    rows = n * a.H;
    find_keys();
    const int64_t size = a.H * a.D;
    queries.assign(a.q + token(0) * size, a.q + token(n) * size);
    ensure_size(inv_rms, rows);
    ensure_size(p, rows * p_stride);
    for (int64_t row = 0; row < rows; row++) {
      float* x = queries.data() + row * a.D;
      inv_rms[row] = 1 / std::sqrt(dot(x, x, a.D) / a.D + a.eps);
      vectorize(a.D, [x, factor = inv_rms[row] * a.scale](auto at) { at(x) *= factor; });
    }
    for (int64_t i = 0; i < n; i++) a.rotate(queries.data() + i * size, token(i), 1);
  }

  void find_keys() {
    int64_t end_entry = 0;
    first_key = a.kv_len;
    first_entry = a.n_entries;
    for (int64_t i = 0; i < n; i++) {
      const int64_t at = token(i);
      first_key = std::min(first_key, t + i + a.W - a.window_len[at]);
      if (a.entries && !a.idx && a.lo[at] < a.hi[at]) {
        first_entry = std::min(first_entry, std::max<int64_t>(a.lo[at], 0));
        end_entry = std::max(end_entry, std::min(a.hi[at], a.n_entries));
      }
    }
    keys = t + n - 1 + a.W - first_key;
    entries = a.idx ? a.topk : std::max<int64_t>(end_entry - first_entry, 0);
    p_stride = (keys + entries + 7) / 8 * 8;
  }

  void choose(int64_t i) {
    chosen.clear();
    for (int64_t k = 0; k < a.topk; k++) {
      const int64_t entry = a.idx[token(i) * a.topk + k];
      STD_TORCH_CHECK(entry < a.n_entries, "sparse_attn: there is no entry ", entry);
      if (entry >= 0) chosen.push_back(b * a.n_entries + entry);
    }
  }

  // f(first row, count of rows, column of p, keys, gradient of keys or null) for each of the
  // matrix products: all rows with the window, all rows with entries, each token with its choice
  template <class F>
  void products(F f, float* g_kv = nullptr, float* g_entries = nullptr) {
    const int64_t D = a.D, offset = (b * a.kv_len + first_key) * D;
    f(0, rows, 0, Matrix{a.kv + offset, keys, D, D}, g_kv ? g_kv + offset : nullptr);
    if (a.entries && !a.idx && entries) {
      const int64_t offset = (b * a.n_entries + first_entry) * D;
      f(0, rows, keys, Matrix{a.entries + offset, entries, D, D},
        g_entries ? g_entries + offset : nullptr);
    }
    for (int64_t i = 0; a.idx && i < n; i++) {
      choose(i);
      const int64_t count = chosen.size();
      if (count == 0) continue;
      float* gathered = ensure_size(chosen_rows, count * D);
      for (int64_t k = 0; k < count; k++)
        std::memcpy(gathered + k * D, a.entries + chosen[k] * D, D * sizeof(float));
      if (g_entries) g_chosen.assign(count * D, 0.f);
      f(i * a.H, a.H, keys, Matrix{gathered, count, D, D}, g_chosen.data());
      for (int64_t k = 0; g_entries && k < count; k++)
        add_scaled(g_entries + chosen[k] * D, 1, g_chosen.data() + k * D, D);
    }
  }

  Matrix query_rows(int64_t row, int64_t count) const {
    return {queries.data() + row * a.D, count, a.D, a.D};
  }

  // p [rows, p_stride] = q k^T, -inf where a key is hidden
  void scores() {
    products([&](int64_t row, int64_t count, int64_t column, Matrix k, float*) {
      matmul(query_rows(row, count), k.T(), p.data() + row * p_stride + column, p_stride);
    });
    for (int64_t i = 0; i < n; i++) {
      const int64_t at = token(i);
      const int64_t end = t + i + a.W - first_key, begin = end - a.window_len[at];
      int64_t from = 0, to = 0;  // of the entries
      if (a.idx) {
        choose(i);
        to = chosen.size();
      } else if (a.entries) {
        from = std::min(std::max<int64_t>(a.lo[at] - first_entry, 0), entries);
        to = std::min(a.hi[at] - first_entry, entries);
      }
      for (int64_t h = 0; h < a.H; h++) {
        float* row = p.data() + (i * a.H + h) * p_stride;
        hide(row, 0, begin);
        hide(row, end, keys + from);
        hide(row, keys + std::max(from, to), p_stride);
      }
    }
  }
  static void hide(float* row, int64_t begin, int64_t end) {
    std::fill(row + begin, row + end, -INFINITY);
  }
};

// In place, scores to probabilities, with the sink in the denominator. Returns its logarithm
static float softmax(float* p, int64_t n, float sink) {
  Vec8 max8 = Vec8{} + sink, sum = {};
  for (int64_t j = 0; j < n; j += 8) {
    const Vec8 s = vec(p + j);
    max8 = s > max8 ? s : max8;
  }
  float max = sink;
  for (int i = 0; i < 8; i++) max = std::max(max, max8[i]);
  for (int64_t j = 0; j < n; j += 8) {
    vec(p + j) = exp8(vec(p + j) - max);
    sum += vec(p + j);
  }
  const float lse = max + std::log(sum_lanes(sum) + std::exp(sink - max));
  const float factor = std::exp(max - lse);
  vectorize(n, [&](auto at) { at(p) *= factor; });
  return lse;
}

std::tuple<Tensor, Tensor> sparse_attn(
    const Tensor& q, const Tensor& kv, const Tensor& sink, const Tensor& window_len,
    const Tensor& cos, const Tensor& sin,
    // Compressed entries
    const MaybeTensor& entries, const MaybeTensor& lo, const MaybeTensor& hi,
    const MaybeTensor& idx, double eps) {
  const Attention a(q, kv, sink, window_len, cos, sin, entries, lo, hi, idx, eps);
  const int64_t D = a.D;
  Tensor o = torch::stable::new_empty(q, {a.B, a.T, a.H, D});
  Tensor lse = torch::stable::new_empty(q, {a.B, a.T, a.H});
  in_parts(a.B * a.blocks, [&](int64_t, int64_t begin, int64_t end) {
    Block block(a);
    for (int64_t number = begin; number < end; number++) {
      block.start(number);
      block.scores();
      const int64_t stride = block.p_stride;
      float* p = block.p.data();
      float* o_rows = data(o) + block.token(0) * a.H * D;
      float* lse_rows = data(lse) + block.token(0) * a.H;
      for (int64_t row = 0; row < block.rows; row++)
        lse_rows[row] = softmax(p + row * stride, stride, a.sink[row % a.H]);
      // o = p kv, the window first
      block.products([&](int64_t row, int64_t count, int64_t column, Matrix k, float*) {
        matmul({p + row * stride + column, count, k.rows, stride}, k, o_rows + row * D, D,
               column > 0);
      });
      for (int64_t i = 0; i < block.n; i++) a.rotate(o_rows + i * a.H * D, block.token(i), -1);
    }
  });
  return {o, lse};
}

// In place: scores p to probabilities, g_p from their gradient to that of the scores:
// g_s = p (g_p - sum(p g_p)). Returns the sum
static float softmax_backward(float* p, float* g_p, int64_t n, float lse) {
  Vec8 sum = {};
  for (int64_t j = 0; j < n; j += 8) {
    vec(p + j) = exp8(vec(p + j) - lse);
    sum += vec(p + j) * vec(g_p + j);
  }
  const float delta = sum_lanes(sum);
  vectorize(n, [&](auto at) { at(g_p) = at(p) * (at(g_p) - delta); });
  return delta;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_attn_backward(
    const Tensor& g_o_, const Tensor& lse_,
    // Inputs of the forward
    const Tensor& q, const Tensor& kv, const Tensor& sink, const Tensor& window_len,
    const Tensor& cos, const Tensor& sin, const MaybeTensor& entries, const MaybeTensor& lo,
    const MaybeTensor& hi, const MaybeTensor& idx, double eps) {
  const Attention a(q, kv, sink, window_len, cos, sin, entries, lo, hi, idx, eps);
  const Tensor g_o = floats(g_o_), lse = floats(lse_);
  const int64_t D = a.D, size = a.H * D, blocks = a.B * a.blocks, parts = count_parts(blocks);
  Tensor g_q = torch::stable::new_empty(q, {a.B, a.T, a.H, D});
  Tensor g_kv = torch::stable::new_empty(q, {a.B, a.kv_len, D});
  Tensor g_sink = torch::stable::new_empty(q, {a.H});
  Tensor g_entries = entries ? torch::stable::new_empty(q, {a.B, a.n_entries, D})
                             : torch::stable::new_empty(q, {0});
  Partials kv_parts(g_kv, parts), sink_parts(g_sink, parts), entries_parts(g_entries, parts);
  in_parts(blocks, [&](int64_t part, int64_t begin, int64_t end) {
    Block block(a);
    std::vector<float> g_memory, g_p_memory;
    float *kv_part = kv_parts.slice(part), *sink_part = sink_parts.slice(part);
    float* entries_part = entries_parts.slice(part);
    for (int64_t number = begin; number < end; number++) {
      block.start(number);
      block.scores();
      const int64_t stride = block.p_stride, first = block.token(0);
      float* p = block.p.data();
      float* g_p = ensure_size(g_p_memory, block.rows * stride);
      g_memory.assign(data(g_o) + first * size, data(g_o) + (first + block.n) * size);
      float* g = g_memory.data();
      for (int64_t i = 0; i < block.n; i++) a.rotate(g + i * size, first + i, 1);
      // g_p = g kv^T. Columns that no product writes meet probabilities of 0
      block.products([&](int64_t row, int64_t count, int64_t column, Matrix k, float*) {
        matmul({g + row * D, count, D, D}, k.T(), g_p + row * stride + column, stride);
      });
      for (int64_t row = 0; row < block.rows; row++) {
        const float row_lse = data(lse)[first * a.H + row];
        const float delta = softmax_backward(p + row * stride, g_p + row * stride, stride, row_lse);
        sink_part[row % a.H] -= std::exp(a.sink[row % a.H] - row_lse) * delta;
      }
      // g_q = g_s k;  g_k = g_s^T q + p^T g, as keys are values
      float* g_rows = data(g_q) + first * size;
      block.products(
          [&](int64_t row, int64_t count, int64_t column, Matrix k, float* g_k) {
            const Matrix g_s{g_p + row * stride + column, count, k.rows, stride};
            const Matrix probs{p + row * stride + column, count, k.rows, stride};
            matmul(g_s, k, g_rows + row * D, D, column > 0);
            matmul(g_s.T(), block.query_rows(row, count), g_k, D, true);
            matmul(probs.T(), {g + row * D, count, D, D}, g_k, D, true);
          },
          kv_part, entries_part);
      for (int64_t i = 0; i < block.n; i++) a.rotate(g_rows + i * size, first + i, -1);
      // Through the norm of the queries: g_x = (g scale - x <g scale, x> / (rms^2 D)) / rms
      for (int64_t row = 0; row < block.rows; row++) {
        const float inv_rms = block.inv_rms[row], *x = a.q + first * size + row * D;
        float* g_row = g_rows + row * D;
        const float along = dot(g_row, x, D) * inv_rms * inv_rms / D;
        vectorize(D, [x, along, factor = inv_rms * a.scale, g_row](auto at) {
          at(g_row) = factor * (at(g_row) - along * at(x));
        });
      }
    }
  });
  kv_parts.reduce();
  sink_parts.reduce();
  entries_parts.reduce();
  return {g_q, g_kv, g_sink, g_entries};
}
