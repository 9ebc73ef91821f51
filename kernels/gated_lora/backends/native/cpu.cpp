// y += B (g ⊙ (A x)) for a batch whose rows use different adapters, in one call per layer.
//
// Decode reads weights and little else, so the order of the work follows the bytes: the router's
// rows first, then the gates, then only those rows of A and B whose gate is not zero. Each weight
// row is read once for all tokens that use it.
//
//     shrink    router rows, and the A of slices whose gates keep every rank     -> u
//     gate      the whole table of routing/spec.py, per token and slice          -> h = g
//     shrink    A rows of the experts that some token chose                      -> h = g ⊙ (A x)
//     expand    columns of y, over the ranks in use
//
// Every number of y is summed in one order, whatever the batch or the number of threads. Plain C++
// and OpenMP without PyTorch's headers: a build takes seconds and knows no ABI. `cpu_native.py`
// has the same structures.
#include <cstdint>
#include <vector>

#include "cpu_gate.h"
#include "cpu_vec.h"

struct Slice {
  Gate gate;
  const float* bt_RN;
  int64_t index, ranks, a_start, a_rows, router_start, head_at, y_start, n, h_start;
};

struct Slot {
  const float *a_RK, *router_GK;
  int64_t k, num_rows, num_ranks, h_width, num_slices;
  const Slice* slices;
};

namespace {

// Weight rows that lie together, for the tokens that use them.
struct Rows {
  const float* rows_RK;
  int64_t k, count, num_tokens;
  const int32_t* tokens;
  float* out;        // column of the first row in token 0's line
  bool scale;        // out holds gates: out *= row · x
};
// Columns of one slice, for some tokens of one slot.
struct Columns {
  const Slice* slice;
  int64_t start, stop, num_tokens;
  const int32_t* tokens;
};
struct Group {
  const Slot* slot;
  int64_t start, count;
};

constexpr int64_t kTokenChunk = 32, kColumns = 8 * W, kFew = 8;

template <int R, int T>
void dots(const Rows& it, const float* x, int64_t x_stride, int64_t out_stride, int64_t first) {
  const float *a = it.rows_RK, *xs[T];
  for (int t = 0; t < T; t++) xs[t] = x + it.tokens[first + t] * x_stride;
  Vec acc[R][T] = {};
  int64_t k = 0;
  auto add = [&](auto get) {
    Vec row[R];
    for (int r = 0; r < R; r++) row[r] = get(a + r * it.k + k);
    for (int t = 0; t < T; t++) {
      Vec xv = get(xs[t] + k);
      for (int r = 0; r < R; r++) acc[r][t] += row[r] * xv;
    }
  };
  for (; k + W <= it.k; k += W) add([](const float* p) { return load(p); });
  if (k < it.k) add([&](const float* p) { return load(p, it.k - k); });
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) {
      float* out = it.out + it.tokens[first + t] * out_stride + r;
      *out = it.scale ? *out * sum(acc[r][t]) : sum(acc[r][t]);
    }
}

template <int R>
void shrink(const Rows& it, const float* x, int64_t x_stride, int64_t out_stride) {
  int64_t t = 0;
  for (; t + 2 <= it.num_tokens; t += 2) dots<R, 2>(it, x, x_stride, out_stride, t);
  if (t < it.num_tokens) dots<R, 1>(it, x, x_stride, out_stride, t);
}

void shrink(const Rows& it, const float* x, int64_t x_stride, int64_t out_stride) {
  switch (it.count) {
    case 1: return shrink<1>(it, x, x_stride, out_stride);
    case 2: return shrink<2>(it, x, x_stride, out_stride);
    case 3: return shrink<3>(it, x, x_stride, out_stride);
    default: return shrink<4>(it, x, x_stride, out_stride);
  }
}

struct Scratch {
  std::vector<float> x, u, h;
  std::vector<int32_t> tokens, ranks, chosen;
  std::vector<Group> groups;
  std::vector<Rows> first, second;
  std::vector<Columns> columns;
};

// Where the numbers of this call stand, one line per token.
struct Lines {
  const float *x, *v;
  float *u, *h;
  int32_t* ranks;  // per slice: how many ranks are in use, then which
  int64_t x_stride, u_stride, h_stride, ranks_stride;
};

// Tokens by slot, in order; slots without an adapter are left out.
int64_t group(Scratch& m, const Slot* const* slots, int64_t num_slots, const int32_t* slots_T,
              int64_t T) {
  m.groups.clear();
  m.tokens.resize(T);
  int64_t at = 0;
  for (int64_t i = 0; i < num_slots && at < T; i++) {
    const int64_t start = at;
    if (slots[i])
      for (int64_t t = 0; t < T; t++)
        if (slots_T[t] == i) m.tokens[at++] = t;
    if (at > start) m.groups.push_back({slots[i], start, at - start});
  }
  return at;
}

// Whole tiles of rows times chunks of tokens: one piece of work each.
void cut(std::vector<Rows>& out, Rows all) {
  for (int64_t t = 0; t < all.num_tokens; t += kTokenChunk)
    for (int64_t r = 0; r < all.count; r += 4) {
      Rows piece = all;
      piece.rows_RK += r * all.k;
      piece.out += r;
      piece.count = std::min<int64_t>(4, all.count - r);
      piece.tokens += t;
      piece.num_tokens = std::min(kTokenChunk, all.num_tokens - t);
      out.push_back(piece);
    }
}

bool sparse(const Slice& s) {
  return s.gate.gated && !s.gate.self && s.gate.select != kAll && s.ranks == s.a_rows;
}

// What is read before any gate is known. `whole`: every row, for a shrink of its own.
void plan_first(Scratch& m, const Lines& l, bool whole) {
  m.first.clear();
  for (const Group& g : m.groups) {
    const Slot& slot = *g.slot;
    auto rows = [&](const float* rows_RK, int64_t start, int64_t count) {
      cut(m.first, {rows_RK, slot.k, count, g.count, m.tokens.data() + g.start, l.u + start,
                    false});
    };
    for (int64_t i = 0; i < slot.num_slices; i++) {
      const Slice& s = slot.slices[i];
      if (whole || !sparse(s)) rows(slot.a_RK + s.a_start * slot.k, s.a_start, s.a_rows);
    }
    rows(slot.router_GK, slot.num_ranks, slot.num_rows - slot.num_ranks);
  }
}

// The A rows of experts that some token chose.
void plan_second(Scratch& m, const Lines& l) {
  m.second.clear();
  int32_t* chosen = m.chosen.data();
  for (const Group& g : m.groups)
    for (int64_t i = 0; i < g.slot->num_slices; i++) {
      const Slice& s = g.slot->slices[i];
      if (!sparse(s)) continue;
      for (int64_t e = 0; e < s.gate.num_gates; e++) {
        const int64_t start = s.gate.block_start[e], stop = s.gate.block_start[e + 1];
        float* out = l.h + s.h_start + start;
        int32_t* tokens = chosen;
        for (int64_t t = 0; t < g.count; t++) {
          const int32_t token = m.tokens[g.start + t];
          if (out[token * l.h_stride] != 0) *chosen++ = token;
        }
        cut(m.second, {g.slot->a_RK + (s.a_start + start) * g.slot->k, g.slot->k,
                       stop - start, chosen - tokens, tokens, out, true});
      }
    }
}

void plan_columns(Scratch& m) {
  m.columns.clear();
  for (const Group& g : m.groups)
    for (int64_t i = 0; i < g.slot->num_slices; i++) {
      const Slice& s = g.slot->slices[i];
      for (int64_t t = 0; t < g.count; t += kTokenChunk)
        for (int64_t n = 0; n < s.n; n += kColumns)
          m.columns.push_back({&s, n, std::min(n + kColumns, s.n),
                               std::min(kTokenChunk, g.count - t), &m.tokens[g.start + t]});
    }
}

// h of one token and slice: gates times A x where A x is known, else the gates. Gates read v.
void gate_slice(const Slice& s, const float* u, const float* v, float* h, int32_t* ranks,
                bool whole) {
  thread_local GateScratch m;
  const Gate& g = s.gate;
  h += s.h_start;
  int32_t used = 0, *list = ranks + s.h_start + s.index + 1;
  if (!g.gated) {
    for (; used < s.ranks; used++) h[list[used] = used] = u[s.a_start + used];
  } else {
    gate(g, v + (g.self ? s.a_start : s.router_start), g.threshold_head ? v[s.head_at] : 0, m);
    const bool known = whole || !sparse(s);
    for (int64_t e = 0; e < g.num_gates; e++)
      for (int64_t r = g.block_start[e]; r < g.block_start[e + 1]; r++) {
        h[r] = known && m.value[e] != 0 ? m.value[e] * u[s.a_start + r % s.a_rows] : m.value[e];
        if (m.value[e] != 0) list[used++] = r;
      }
  }
  list[-1] = used;
}

template <int V, typename Y, typename... Count>
void add_columns(const Slice& s, const float* h, const int32_t* list, int64_t n, Y* y,
                 Count... count) {
  Vec acc[V] = {};
  for (int32_t j = 1; j <= list[0]; j++) {
    const float* row = s.bt_RN + list[j] * s.n + n;
    for (int v = 0; v < V; v++) acc[v] += h[list[j]] * load(row + v * W, count...);
  }
  for (int v = 0; v < V; v++)
    store(y + n + v * W, load(y + n + v * W, count...) + acc[v], count...);
}

template <typename Y>
void expand(const Columns& c, const Lines& l, Y* y, int64_t y_stride) {
  const Slice& s = *c.slice;
  for (int64_t i = 0; i < c.num_tokens; i++) {
    const int64_t t = c.tokens[i];
    const float* h = l.h + t * l.h_stride + s.h_start;
    const int32_t* list = l.ranks + t * l.ranks_stride + s.h_start + s.index;
    Y* out = y + t * y_stride + s.y_start;
    int64_t n = c.start;
    if (list[0] == 0) continue;
    for (; n + 4 * W <= c.stop; n += 4 * W) add_columns<4>(s, h, list, n, out);
    for (; n + W <= c.stop; n += W) add_columns<1>(s, h, list, n, out);
    if (n < c.stop) add_columns<1>(s, h, list, n, out, c.stop - n);
  }
}

}  // namespace

extern "C" int64_t has_float16() {
#if defined(__F16C__)
  return 1;
#else
  return 0;
#endif
}

// x and y: both launches. Without y: only the shrink, into u. Without x: only gate and expand,
// from u, where gates read v (null: u), which has the same stride. Types: 0 float32, 1 bfloat16,
// 2 float16.
extern "C" void gated_lora(const Slot* const* slots, int64_t num_slots, const int32_t* slots_T,
                           int64_t T, const void* x, int64_t x_stride, int64_t x_type, float* u,
                           const float* v, int64_t u_stride, void* y, int64_t y_stride, int64_t y_type) {
  thread_local Scratch scratch;
  Scratch& m = scratch;
  const int64_t rows = group(m, slots, num_slots, slots_T, T);
  if (rows == 0) return;
  int64_t num_rows = 0, h_width = 0, num_slices = 0, choices = 0, work = 0;
  for (const Group& g : m.groups) {
    num_rows = std::max(num_rows, g.slot->num_rows);
    h_width = std::max(h_width, g.slot->h_width);
    num_slices = std::max(num_slices, g.slot->num_slices);
    choices += g.count * g.slot->h_width;
    work += g.count * g.slot->num_rows * g.slot->k;
  }
  const int64_t k = m.groups[0].slot->k;
  const bool whole = !x || !y;
  Lines l = {(const float*)x, v, u, nullptr, nullptr, x_stride, u_stride, h_width,
             h_width + num_slices};
  if (x && x_type) m.x.resize(T * k), l.x = m.x.data(), l.x_stride = k;
  if (!u) m.u.resize(T * num_rows), l.u = m.u.data(), l.u_stride = num_rows;
  if (y) {
    m.h.resize(T * l.h_stride), m.ranks.resize(T * l.ranks_stride), m.chosen.resize(choices);
    l.h = m.h.data(), l.ranks = m.ranks.data();
    plan_columns(m);
  }
  if (!v) l.v = l.u;
  if (x) plan_first(m, l, whole);

  auto widen_row = [&](int64_t i) {
    const int64_t t = m.tokens[i];
    typed(x_type, x, [&](auto* p) { widen(m.x.data() + t * k, p + t * x_stride, k); });
  };
  auto gate_row = [&](int64_t i) {
    const int64_t t = m.tokens[i];
    const Slot& slot = *slots[slots_T[t]];
    for (int64_t s = 0; s < slot.num_slices; s++)
      gate_slice(slot.slices[s], l.u + t * l.u_stride, l.v + t * l.u_stride, l.h + t * l.h_stride,
                 l.ranks + t * l.ranks_stride, whole);
  };
  const bool few = rows <= kFew;  // one thread is faster than all of them are in meeting
  if (few && x && x_type)
    for (int64_t i = 0; i < rows; i++) widen_row(i);

#pragma omp parallel if (work > 1 << 15)
  {
    if (!few && x && x_type) {
#pragma omp for
      for (int64_t i = 0; i < rows; i++) widen_row(i);
    }
    if (x) {
#pragma omp for
      for (const Rows& r : m.first) shrink(r, l.x, l.x_stride, l.u_stride);
    }
    if (y) {
      if (!few) {
#pragma omp for
        for (int64_t i = 0; i < rows; i++) gate_row(i);
      }
#pragma omp single
      {
        for (int64_t i = 0; few && i < rows; i++) gate_row(i);
        if (x) plan_second(m, l);
      }
      if (x) {
#pragma omp for
        for (const Rows& r : m.second) shrink(r, l.x, l.x_stride, l.h_stride);
      }
#pragma omp for
      for (const Columns& c : m.columns)
        typed(y_type, y, [&](auto* p) { expand(c, l, p, y_stride); });
    }
  }
}

#include "cpu_op.h"
