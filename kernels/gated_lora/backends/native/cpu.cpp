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
  const float *scale_N, *shift_N;  // of y, before B is added to it; null: y stays
  int64_t index, ranks, a_start, a_rows, router_start, head_at, y_start, n, h_start;
  int64_t row_start, factor_at;  // in the numbers that come with a row; -1: no factor
  int64_t parts;                 // how many, from here on, add to the same columns; 0: not the first
};

struct Slot {
  const float *a_RK, *router_GK;
  int64_t k, num_rows, num_ranks, h_width, num_slices;
  int64_t stats_at;  // where u has the sum of x and of its squares; -1: no router reads them
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
// Columns of one slice, for some tokens of one slot; the slice's first part.
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
  const float *x, *v, *given;
  float *u, *h;
  int32_t* ranks;  // per slice: how many ranks are in use, then which
  int64_t x_stride, given_stride, u_stride, h_stride, ranks_stride;
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
  const Gate& g = s.gate;
  const bool some = g.select != kSelectAll || g.given;  // or all of them, which is not known
  return g.gated && !g.self && some && !g.product && s.ranks == s.a_rows;
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
    const int64_t stop = slot.stats_at < 0 ? slot.num_rows : slot.stats_at;
    rows(slot.router_GK, slot.num_ranks, stop - slot.num_ranks);
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
      if (s.parts == 0) continue;
      for (int64_t t = 0; t < g.count; t += kTokenChunk)
        for (int64_t n = 0; n < s.n; n += kColumns)
          m.columns.push_back({&s, n, std::min(n + kColumns, s.n),
                               std::min(kTokenChunk, g.count - t), &m.tokens[g.start + t]});
    }
}

// The sum of x and of its squares.
void add_up(const float* x, int64_t k, float* stats) {
  Vec total = {}, squares = {};
  auto add = [&](Vec v) { total += v, squares += v * v; };
  int64_t i = 0;
  for (; i + W <= k; i += W) add(load(x + i));
  if (i < k) add(load(x + i, k - i));
  stats[0] = sum(total), stats[1] = sum(squares);
}

// h of one token and slice: gates times A x where A x is known, else the gates. Gates read v, and
// the row's own numbers.
void gate_slice(const Slot& slot, const Slice& s, const float* u, const float* v,
                const float* given, float* h, int32_t* ranks, bool whole) {
  thread_local GateScratch m;
  const Gate& g = s.gate;
  h += s.h_start;
  int32_t used = 0, *list = ranks + s.h_start + s.index + 1;
  const float factor = s.factor_at < 0 ? 1 : given[s.factor_at];
  const float* ax = u + s.a_start;
  if (factor == 0) {
    std::fill(h, h + s.ranks, 0.f);
  } else if (!g.gated) {
    for (; used < s.ranks; used++) h[list[used] = used] = factor * ax[used];
  } else {
    const float* logits = g.given ? given + s.row_start : v + (g.self ? s.a_start : s.router_start);
    gate(g, logits, v + slot.stats_at, g.threshold_head ? v[s.head_at] : 0, m);
    const bool known = whole || !sparse(s);
    const int64_t r_each = s.ranks / g.num_gates;
    if (g.product) {  // one A x, mixed from all
      m.mixed.assign(r_each, 0);
      for (int64_t e = 0; e < g.num_gates; e++)
        for (int64_t r = 0; m.value[e] != 0 && r < r_each; r++)
          m.mixed[r] += m.value[e] * ax[e * r_each + r];
      ax = m.mixed.data();
    }
    const int64_t rows = g.product ? r_each : s.a_rows;
    for (int64_t e = 0; e < g.num_gates; e++) {
      const float value = factor * m.value[e];
      for (int64_t r = g.block_start[e]; r < g.block_start[e + 1]; r++) {
        h[r] = known && value != 0 ? value * ax[r % rows] : value;
        if (value != 0) list[used++] = r;
      }
    }
  }
  list[-1] = used;
}

// B's columns of a part, over the ranks in use.
template <int V, typename... Count>
inline void add_part(Vec (&acc)[V], const Slice& s, const float* h, const int32_t* ranks, int64_t n,
                     Count... count) {
  const int32_t* list = ranks + s.h_start + s.index;
  h += s.h_start;
  for (int32_t j = 1; j <= list[0]; j++) {
    const float* row = s.bt_RN + list[j] * s.n + n;
    for (int v = 0; v < V; v++) acc[v] += h[list[j]] * load(row + v * W, count...);
  }
}

template <int V, typename Y, typename... Count>
void add_columns(const Slice* slice, const float* h, const int32_t* ranks, int64_t n, Y* y,
                 Count... count) {
  Vec acc[V] = {};
  if (slice->parts == 1) {  // in registers all along
    add_part(acc, *slice, h, ranks, n, count...);
  } else {
    for (const Slice* s = slice; s < slice + slice->parts; s++)
      add_part(acc, *s, h, ranks, n, count...);
  }
  for (int v = 0; v < V; v++) {
    Vec own = load(y + n + v * W, count...);
    if (slice->scale_N)
      own = own * load(slice->scale_N + n + v * W, count...) +
            load(slice->shift_N + n + v * W, count...);
    store(y + n + v * W, own + acc[v], count...);
  }
}

template <typename Y>
void expand(const Columns& c, const Lines& l, Y* y, int64_t y_stride) {
  const Slice* s = c.slice;
  for (int64_t i = 0; i < c.num_tokens; i++) {
    const int64_t t = c.tokens[i];
    const float* h = l.h + t * l.h_stride;
    const int32_t* ranks = l.ranks + t * l.ranks_stride;
    Y* out = y + t * y_stride + s->y_start;
    int64_t n = c.start;
    int32_t used = 0;
    for (const Slice* p = s; p < s + s->parts; p++) used += ranks[p->h_start + p->index];
    if (used == 0 && !s->scale_N) continue;
    for (; n + 4 * W <= c.stop; n += 4 * W) add_columns<4>(s, h, ranks, n, out);
    for (; n + W <= c.stop; n += W) add_columns<1>(s, h, ranks, n, out);
    if (n < c.stop) add_columns<1>(s, h, ranks, n, out, c.stop - n);
  }
}

}  // namespace

extern "C" void known_codes(int64_t* counts) {
  counts[0] = kScores, counts[1] = kSelects, counts[2] = kWeights;
}

extern "C" int64_t has_float16() {
#if defined(__F16C__)
  return 1;
#else
  return 0;
#endif
}

// x and y: both launches. Without y: only the shrink, into u. Without x: only gate and expand,
// from u, where gates read v (null: u), which has the same stride. `given`: numbers that come with
// each row, null where no slot reads them. Types: 0 float32, 1 bfloat16, 2 float16.
extern "C" void gated_lora(const Slot* const* slots, int64_t num_slots, const int32_t* slots_T,
                           int64_t T, const void* x, int64_t x_stride, int64_t x_type, float* u,
                           const float* v, int64_t u_stride, const float* given,
                           int64_t given_stride, void* y, int64_t y_stride, int64_t y_type) {
  thread_local Scratch scratch;
  Scratch& m = scratch;
  const int64_t rows = group(m, slots, num_slots, slots_T, T);
  if (rows == 0) return;
  int64_t num_rows = 0, h_width = 0, num_slices = 0, choices = 0, work = 0;
  bool stats = false;
  for (const Group& g : m.groups) {
    num_rows = std::max(num_rows, g.slot->num_rows);
    h_width = std::max(h_width, g.slot->h_width);
    num_slices = std::max(num_slices, g.slot->num_slices);
    choices += g.count * g.slot->h_width;
    work += g.count * g.slot->num_rows * g.slot->k;
    stats = stats || (x && g.slot->stats_at >= 0);
  }
  const int64_t k = m.groups[0].slot->k;
  const bool whole = !x || !y;
  Lines l = {(const float*)x, v, given, u, nullptr, nullptr, x_stride, given_stride, u_stride,
             h_width, h_width + num_slices};
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
  auto add_up_row = [&](int64_t i) {
    const int64_t t = m.tokens[i], at = slots[slots_T[t]]->stats_at;
    if (at >= 0) add_up(l.x + t * l.x_stride, k, l.u + t * l.u_stride + at);
  };
  auto gate_row = [&](int64_t i) {
    const int64_t t = m.tokens[i];
    const Slot& slot = *slots[slots_T[t]];
    for (int64_t s = 0; s < slot.num_slices; s++)
      gate_slice(slot, slot.slices[s], l.u + t * l.u_stride, l.v + t * l.u_stride,
                 l.given + t * l.given_stride, l.h + t * l.h_stride,
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
    if (stats) {
#pragma omp for
      for (int64_t i = 0; i < rows; i++) add_up_row(i);
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
