#include "common.h"

constexpr int64_t BLOCK = 16;  // tokens

struct Attention {
  std::vector<Tensor> held;
  const float *q, *kv, *sink, *cos, *sin, *entries = nullptr;
  const int64_t *seen, *lo = nullptr, *hi = nullptr, *idx = nullptr;
  int64_t B, T, H, D, N, W, E = 0, K = 0, r, blocks;
  float eps, scale;

  const float* keep(const Tensor& t) { held.push_back(floats(t)); return data(held.back()); }
  const int64_t* keep_int(const Tensor& t) { held.push_back(packed(t, ScalarType::Long)); return (const int64_t*)held.back().data_ptr(); }
  using Maybe = std::optional<Tensor>;
  Attention(const Tensor& q_, const Tensor& kv_, const Tensor& sink_, const Tensor& seen_, const Tensor& cos_, const Tensor& sin_,
            const Maybe& entries_, const Maybe& lo_, const Maybe& hi_, const Maybe& idx_, double eps_) {
    q = keep(q_), kv = keep(kv_), sink = keep(sink_), cos = keep(cos_), sin = keep(sin_), seen = keep_int(seen_);
    B = q_.size(0), T = q_.size(1), H = q_.size(2), D = q_.size(3), N = kv_.size(1), W = N - T + 1, r = 2 * cos_.size(2);
    if (entries_) entries = keep(*entries_), lo = keep_int(*lo_), hi = keep_int(*hi_), E = entries_->size(1);
    if (idx_) idx = keep_int(*idx_), K = idx_->size(2);
    blocks = (T + BLOCK - 1) / BLOCK, eps = eps_, scale = 1 / std::sqrt((float)D);
  }

  // The last r dims of the heads of token `at` (counted over all rows), turned by its angles or back
  void turn(float* x, int64_t at, float sign) const {
    const float *c = cos + at * (r / 2), *s = sin + at * (r / 2);
    for (int64_t h = 0; h < H; h++)
      for (int64_t i = 0; i < r / 2; i++) {
        float* pair = x + h * D + D - r + 2 * i;
        const float a = pair[0], b = pair[1], sine = sign * s[i];
        pair[0] = a * c[i] - b * sine, pair[1] = a * sine + b * c[i];
      }
  }
};

struct Block {
  const Attention& a;
  std::vector<float> turned, norms, p, chosen, g_chosen;  // turned: queries, normalised, scaled and rotated
  std::vector<int64_t> list;                // entries chosen by a token
  int64_t b, t, n, rows, first, keys, e, ents, ld;  // tokens t .. t + n of row b; window keys first .., entries e ..; a row of p
  Block(const Attention& a) : a(a) {}

  void start(int64_t block) {
    b = block / a.blocks, t = block % a.blocks * BLOCK, n = std::min(BLOCK, a.T - t), rows = n * a.H;
    int64_t end = 0;
    first = a.N, e = a.E, ents = 0;
    for (int64_t i = 0; i < n; i++) {
      const int64_t at = token(i);
      first = std::min(first, t + i + a.W - a.seen[at]);
      if (a.entries && !a.idx && a.lo[at] < a.hi[at]) e = std::min(e, std::max<int64_t>(a.lo[at], 0)), end = std::max(end, std::min(a.hi[at], a.E));
    }
    keys = t + n - 1 + a.W - first, ents = a.idx ? a.K : std::max<int64_t>(end - e, 0), ld = (keys + ents + 7) / 8 * 8;
    turned.assign(a.q + token(0) * a.H * a.D, a.q + (token(0) + n) * a.H * a.D);
    room(norms, rows), room(p, rows * ld);
    for (int64_t row = 0; row < rows; row++) {
      float* x = turned.data() + row * a.D;
      norms[row] = 1 / std::sqrt(dot(x, x, a.D) / a.D + a.eps);
      each(a.D, [x, by = norms[row] * a.scale](auto at) { at(x) *= by; });
    }
    for (int64_t i = 0; i < n; i++) a.turn(turned.data() + i * a.H * a.D, token(i), 1);
  }
  int64_t token(int64_t i) const { return b * a.T + t + i; }

  // f(first of rows, count of them, column of p, keys, count of them, gradient of keys): what meets in matrix products
  template <class F> void products(F f, float* g_kv = nullptr, float* g_entries = nullptr) {
    const int64_t at = (b * a.N + first) * a.D;
    f(0, rows, 0, a.kv + at, keys, g_kv ? g_kv + at : nullptr);
    if (a.entries && !a.idx && ents) f(0, rows, keys, a.entries + (b * a.E + e) * a.D, ents, g_entries ? g_entries + (b * a.E + e) * a.D : nullptr);
    for (int64_t i = 0; a.idx && i < n; i++) {
      choose(i);
      chosen.resize(list.size() * a.D), g_chosen.assign(g_entries ? chosen.size() : 0, 0.f);
      for (size_t k = 0; k < list.size(); k++) std::memcpy(chosen.data() + k * a.D, a.entries + list[k] * a.D, 4 * a.D);
      if (!list.empty()) f(i * a.H, a.H, keys, chosen.data(), (int64_t)list.size(), g_chosen.data());
      for (size_t k = 0; g_entries && k < list.size(); k++) add_scaled(g_entries + list[k] * a.D, 1, g_chosen.data() + k * a.D, a.D);
    }
  }
  void choose(int64_t i) {
    list.clear();
    for (int64_t k = 0; k < a.K; k++) {
      const int64_t entry = a.idx[token(i) * a.K + k];
      STD_TORCH_CHECK(entry < a.E, "sparse_attn: there is no entry ", entry);
      if (entry >= 0) list.push_back(b * a.E + entry);
    }
  }

  // p: scores, -inf where hidden
  void scores() {
    products([&](int64_t row, int64_t count, int64_t column, const float* k, int64_t width, float*) {
      product({turned.data() + row * a.D, a.D, 1}, {k, 1, a.D}, p.data() + row * ld + column, ld, count, width, a.D, false);
    });
    for (int64_t i = 0; i < n; i++) {
      const int64_t at = token(i), last = t + i + a.W - first, begin = last - a.seen[at];
      int64_t from = 0, to = 0;
      if (a.idx) choose(i), to = list.size();
      else if (a.entries) from = std::min(std::max<int64_t>(a.lo[at] - e, 0), ents), to = std::min(a.hi[at] - e, ents);
      for (int64_t h = 0; h < a.H; h++) {
        float* row = p.data() + (i * a.H + h) * ld;
        hide(row, 0, begin), hide(row, last, keys + from), hide(row, keys + std::max(from, to), ld);
      }
    }
  }
  static void hide(float* row, int64_t begin, int64_t end) { std::fill(row + begin, row + end, -INFINITY); }
};

std::tuple<Tensor, Tensor> sparse_attn(const Tensor& q, const Tensor& kv, const Tensor& sink, const Tensor& seen, const Tensor& cos,
    const Tensor& sin, const std::optional<Tensor>& entries, const std::optional<Tensor>& lo, const std::optional<Tensor>& hi,
    const std::optional<Tensor>& idx, double eps) {
  const Attention a(q, kv, sink, seen, cos, sin, entries, lo, hi, idx, eps);
  Tensor out = torch::stable::new_empty(q, {a.B, a.T, a.H, a.D}), lse = torch::stable::new_empty(q, {a.B, a.T, a.H});
  in_parts(a.B * a.blocks, [&](int64_t, int64_t begin, int64_t end) {
    Block block(a);
    for (int64_t number = begin; number < end; number++) {
      block.start(number);
      block.scores();
      float *o = data(out) + block.token(0) * a.H * a.D, *l = data(lse) + block.token(0) * a.H;
      const int64_t ld = block.ld;
      for (int64_t row = 0; row < block.rows; row++) {
        float *p = block.p.data() + row * ld, top = a.sink[row % a.H];
        Vec8 high = Vec8{} + top, sum = {};
        for (int64_t j = 0; j < ld; j += 8) { const Vec8 s = vec(p + j); high = s > high ? s : high; }
        for (int i = 0; i < 8; i++) top = std::max(top, high[i]);
        for (int64_t j = 0; j < ld; j += 8) sum += vec(p + j) = exponential(vec(p + j) - top);
        l[row] = top + std::log(total(sum) + std::exp(a.sink[row % a.H] - top));
        const float share = std::exp(top - l[row]);
        each(ld, [&](auto at) { at(p) *= share; });
      }
      block.products([&](int64_t row, int64_t count, int64_t column, const float* k, int64_t width, float*) {
        product({block.p.data() + row * ld + column, ld, 1}, {k, a.D, 1}, o + row * a.D, a.D, count, a.D, width, column);  // the window comes first
      });
      for (int64_t i = 0; i < block.n; i++) a.turn(o + i * a.H * a.D, block.token(i), -1);
    }
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_attn_backward(const Tensor& g_, const Tensor& lse_, const Tensor& q, const Tensor& kv,
    const Tensor& sink, const Tensor& seen, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& entries,
    const std::optional<Tensor>& lo, const std::optional<Tensor>& hi, const std::optional<Tensor>& idx, double eps) {
  const Attention a(q, kv, sink, seen, cos, sin, entries, lo, hi, idx, eps);
  const Tensor given = floats(g_), lses = floats(lse_);
  Tensor g_q = torch::stable::new_empty(q, {a.B, a.T, a.H, a.D}), g_kv = torch::stable::new_empty(q, {a.B, a.N, a.D});
  Tensor g_sink = torch::stable::new_empty(q, {a.H});
  Tensor g_entries = entries ? torch::stable::new_empty(q, {a.B, a.E, a.D}) : torch::stable::new_empty(q, {0});
  const int64_t count = a.B * a.blocks, parts = parts_of(count), size = a.H * a.D;
  Sums of_kv(g_kv, parts), of_sink(g_sink, parts), of_entries(g_entries, parts);
  in_parts(count, [&](int64_t part, int64_t begin, int64_t end) {
    Block block(a);
    std::vector<float> g, g_p;
    float *sum_kv = of_kv.of(part), *sum_sink = of_sink.of(part), *sum_entries = of_entries.of(part);
    for (int64_t number = begin; number < end; number++) {
      block.start(number);
      block.scores();
      const int64_t ld = block.ld, at = block.token(0);
      g.assign(data(given) + at * size, data(given) + (at + block.n) * size);
      room(g_p, block.rows * ld);  // what is not written below meets probabilities of 0
      for (int64_t i = 0; i < block.n; i++) a.turn(g.data() + i * size, at + i, 1);
      block.products([&](int64_t row, int64_t count, int64_t column, const float* k, int64_t width, float*) {
        product({g.data() + row * a.D, a.D, 1}, {k, 1, a.D}, g_p.data() + row * ld + column, ld, count, width, a.D, false);
      });
      for (int64_t row = 0; row < block.rows; row++) {  // p becomes probabilities, g_p gradients of scores
        float *p = block.p.data() + row * ld, *s = g_p.data() + row * ld;
        const float l = data(lses)[at * a.H + row];
        Vec8 sum = {};
        for (int64_t j = 0; j < ld; j += 8) sum += (vec(p + j) = exponential(vec(p + j) - l)) * vec(s + j);
        const float delta = total(sum);
        each(ld, [&](auto at) { at(s) = at(p) * (at(s) - delta); });
        sum_sink[row % a.H] -= std::exp(a.sink[row % a.H] - l) * delta;
      }
      float* out = data(g_q) + at * size;
      block.products([&](int64_t row, int64_t count, int64_t column, const float* k, int64_t width, float* g_k) {
        const float *p = block.p.data() + row * ld + column, *s = g_p.data() + row * ld + column;
        product({s, ld, 1}, {k, a.D, 1}, out + row * a.D, a.D, count, a.D, width, column);
        product({s, 1, ld}, {block.turned.data() + row * a.D, a.D, 1}, g_k, a.D, width, a.D, count, true);
        product({p, 1, ld}, {g.data() + row * a.D, a.D, 1}, g_k, a.D, width, a.D, count, true);
      }, sum_kv, sum_entries);
      for (int64_t i = 0; i < block.n; i++) a.turn(out + i * size, at + i, -1);
      for (int64_t row = 0; row < block.rows; row++) {
        const float norm = block.norms[row], *x = a.q + at * size + row * a.D;
        const float along = dot(out + row * a.D, x, a.D) * norm * norm / a.D;
        each(a.D, [x, along, by = norm * a.scale, to = out + row * a.D](auto at) { at(to) = by * (at(to) - along * at(x)); });
      }
    }
  });
  of_kv.finish(), of_sink.finish(), of_entries.finish();
  return {g_q, g_kv, g_sink, g_entries};
}
