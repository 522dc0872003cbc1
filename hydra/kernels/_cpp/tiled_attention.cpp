// Softmax attention over tiles of keys and queries, forward and backward, without keeping scores (Dao, FlashAttention-2,
// arXiv 2307.08691, algorithms 1 and 2).
//
// Scores are computed transposed: a tile has keys for rows and queries for columns, so that every step of the softmax
// takes 16 queries at once and nothing is ever added up across a vector.
//
// B rows, K key/value heads, G query heads of each, T queries, the last of S keys, H width of queries and keys, E width of
// values. What a thread works on at once is one key/value head of one row; where these are few, several threads share
// one, and the backward pass then adds up the parts that they have found of the queries' gradients.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include <torch/csrc/stable/ops.h>

#include "tiles.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t kKeys = 256, kQueries = 128;  // of a tile: its scores and what they are made of fit into a core's cache
constexpr int64_t kAlignment = 64;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A tensor (B, K, G, n, width) whose last axis is contiguous; G is 1 for keys and values.
template <class X>
struct Rows {
    X* data;
    int64_t batch, kv_head, group, row;

    explicit Rows(const StridedView& view) : data(static_cast<X*>(view.data)) {
        check(view.strides[view.n_dims - 1] == 1 || view.sizes[view.n_dims - 1] == 1, "the last axis must be contiguous");
        batch = view.strides[0], kv_head = view.strides[1], row = view.strides[view.n_dims - 2];
        group = view.n_dims == 5 ? view.strides[2] : 0;
    }
    X* at(int64_t b, int64_t k, int64_t g, int64_t n) const {
        return data + b * batch + k * kv_head + g * group + n * row;
    }
};

struct Sizes {
    int64_t B, K, G, T, S, H, E;
    int64_t n_past, wide_h, wide_e, n_key_tiles, n_query_tiles, n_first_rows;
    float scale;
    const int64_t* first_visible;  // (B or 1, T), or null
    bool has_amx;

    Sizes(const StridedView& q, const StridedView& k, const StridedView& v, const StridedView* first, double scale, bool has_amx)
        : B(q.sizes[0]), K(q.sizes[1]), G(q.sizes[2]), T(q.sizes[3]), S(k.sizes[2]), H(q.sizes[4]), E(v.sizes[3]),
          n_past(S - T), wide_h(round_up(H, 32)), wide_e(round_up(E, 32)), n_key_tiles(round_up(S, kKeys) / kKeys),
          n_query_tiles(round_up(T, kQueries) / kQueries), n_first_rows(first == nullptr ? 1 : first->sizes[0]),
          scale(static_cast<float>(scale)),
          first_visible(first == nullptr ? nullptr : static_cast<const int64_t*>(first->data)), has_amx(has_amx) {}

    int64_t first_of(int64_t b, int64_t t) const {
        return first_visible == nullptr ? 0 : first_visible[(n_first_rows == 1 ? 0 : b) * T + std::min(t, T - 1)];
    }
    // Whether some query of a tile sees some key of a tile, and whether all see all.
    bool is_seen(int64_t b, int64_t key, int64_t query) const {
        return key <= n_past + std::min(query + kQueries, T) - 1 && key + kKeys > first_of(b, query);
    }
    bool is_all_seen(int64_t b, int64_t key, int64_t query) const {
        return key + kKeys - 1 <= n_past + query && key >= first_of(b, query + kQueries - 1);
    }
};

// How many threads share a head: as few as leave none without work.
int64_t n_sharing(const Sizes& sizes, int64_t n_threads, int64_t most) {
    const int64_t n_heads = sizes.B * sizes.K;
    int64_t n = 1;
    while (n < most && n_heads * n < 4 * n_threads && n_heads * n % n_threads != 0) ++n;
    return n;
}

// Memory of one thread, cut into pieces.
class Pieces {
  public:
    explicit Pieces(char* start) : next_(start) {}
    template <class Y>
    Y* take(int64_t n) {
        Y* piece = reinterpret_cast<Y*>(next_);
        next_ += round_up(n * static_cast<int64_t>(sizeof(Y)), kAlignment);
        return piece;
    }
    int64_t n_bytes_since(const char* start) const { return next_ - start; }

  private:
    char* next_;
};

// Calls work(item, memory) for every item; memory is n_bytes for each thread, and not shared.
template <class Work>
void for_each_item(int64_t n_items, int64_t n_bytes, const Work& work) {
    const int64_t n_workers = std::min<int64_t>(torch::stable::get_num_threads(), n_items);
    n_bytes = round_up(n_bytes, 4096);
    std::unique_ptr<char, decltype(&std::free)> memory(
        static_cast<char*>(std::aligned_alloc(4096, n_workers * n_bytes)), &std::free);
    check(memory != nullptr, "there must be memory for tiles of attention");
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, n_workers, 1, [&](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker)
            for (int64_t item = next++; item < n_items; item = next++) work(item, memory.get() + worker * n_bytes);
    });
}

// Minus infinity where a query does not see a key.
void hide(const Sizes& sizes, int64_t b, int64_t key, int64_t query, float* scores) {
    for (int64_t column = 0; column < kQueries; column += 16) {
        int32x16 first, last;
        for (int64_t lane = 0; lane < 16; ++lane) {
            first[lane] = static_cast<int32_t>(sizes.first_of(b, query + column + lane) - key);
            last[lane] = static_cast<int32_t>(sizes.n_past + query + column + lane - key);
        }
        for (int32_t s = 0; s < kKeys; ++s) {
            const float16 score = load(scores + s * kQueries + column);
            store(scores + s * kQueries + column, (first <= s) & (last >= s) ? score : spread(-INFINITY));
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ forward

template <class X, class Y>
struct Forward {
    static constexpr int kTerms = sizeof(X) == 2 ? 5 : 7;
    const Sizes& sizes;
    Rows<const X> q, k, v;
    Rows<X> out;
    float* lse;
    int64_t n_parts;

    struct Scratch {
        Y *k_rows, *v_columns, *q_columns, *weights, *rows;
        float *scores, *sums, *tops, *totals;
        int64_t n_bytes;

        Scratch(const Sizes& s, char* start) {
            Pieces pieces(start);
            const int64_t width = std::max(s.wide_h, s.wide_e);
            k_rows = pieces.take<Y>(s.n_key_tiles * kKeys * s.wide_h);
            v_columns = pieces.take<Y>(s.n_key_tiles * kKeys * s.wide_e);
            q_columns = pieces.take<Y>(kQueries * s.wide_h);
            weights = pieces.take<Y>(kKeys * kQueries);
            rows = pieces.take<Y>(2 * std::max(kKeys, kQueries) * width);
            scores = pieces.take<float>(kKeys * kQueries);
            sums = pieces.take<float>(2 * s.wide_e * kQueries);
            tops = pieces.take<float>(kQueries);
            totals = pieces.take<float>(kQueries);
            n_bytes = pieces.n_bytes_since(start);
        }
    };

    // Every n_parts-th tile of the queries of one head.
    void run(int64_t item, char* memory) const {
        const int64_t head = item / n_parts, b = head / sizes.K, kv_head = head % sizes.K;
        const Scratch scratch(sizes, memory);
        for (int64_t tile = 0; tile < sizes.n_key_tiles; ++tile) {
            const int64_t key = tile * kKeys, n = std::min(kKeys, sizes.S - key);
            copy_rows(k.at(b, kv_head, 0, key), k.row, n, sizes.H, scratch.k_rows + key * sizes.wide_h, kKeys, sizes.wide_h);
            copy_rows(v.at(b, kv_head, 0, key), v.row, n, sizes.E, scratch.rows, kKeys, sizes.wide_e);
            Y* pairs = scratch.rows + kKeys * sizes.wide_e;
            make_pairs(scratch.rows, pairs, kKeys, sizes.wide_e);
            transpose_words(pairs, scratch.v_columns + key * sizes.wide_e, kKeys / kPair<Y>, sizes.wide_e);
        }
        for (int64_t tile = sizes.n_query_tiles - 1 - item % n_parts; tile >= 0; tile -= n_parts)
            for (int64_t group = 0; group < sizes.G; ++group) attend(b, kv_head, group, tile * kQueries, scratch);
        if (sizes.has_amx) at::native::cpublas::brgemm_release(true);
    }

    void attend(int64_t b, int64_t kv_head, int64_t group, int64_t query, const Scratch& scratch) const {
        const int64_t n = std::min(kQueries, sizes.T - query);
        copy_rows(q.at(b, kv_head, group, query), q.row, n, sizes.H, scratch.rows, kQueries, sizes.wide_h);
        transpose_words(scratch.rows, scratch.q_columns, kQueries, sizes.wide_h / kPair<Y>);
        std::fill_n(scratch.tops, kQueries, -INFINITY), std::fill_n(scratch.totals, kQueries, 0.f);
        bool is_first = true;
        const int64_t start = sizes.first_of(b, query) / kKeys * kKeys;
        for (int64_t key = start; key < sizes.S && sizes.is_seen(b, key, query); key += kKeys) {
            multiply(kKeys, kQueries, sizes.wide_h, scratch.k_rows + key * sizes.wide_h, scratch.q_columns, scratch.scores,
                     false, sizes.has_amx);
            if (!sizes.is_all_seen(b, key, query)) hide(sizes, b, key, query, scratch.scores);
            weigh(scratch, is_first);
            multiply(sizes.wide_e, kQueries, kKeys, scratch.v_columns + key * sizes.wide_e, scratch.weights, scratch.sums,
                     !is_first, sizes.has_amx);
            is_first = false;
        }
        finish(b, kv_head, group, query, n, scratch);
    }

    // Scores to weights relative to the largest score so far; what was added up before is put in proportion.
    void weigh(const Scratch& scratch, bool is_first) const {
        const float scale = sizes.scale * kLog2E;
        for (int64_t column = 0; column < kQueries; column += 16) {
            const float* scores = scratch.scores + column;
            float16 top0 = load(scores), top1 = load(scores + kQueries);
            for (int64_t s = 2; s < kKeys; s += 2) {
                top0 = larger(load(scores + s * kQueries), top0);
                top1 = larger(load(scores + (s + 1) * kQueries), top1);
            }
            const float16 old_top = load(scratch.tops + column);
            float16 top = larger(larger(top0, top1) * scale, old_top);
            store(scratch.tops + column, top);
            float16 total = load(scratch.totals + column);
            if (int32x16 is_new = top != old_top; !is_first && is_any(is_new)) {
                const float16 factor = old_top == -INFINITY ? spread(0.f) : exp2_of<kTerms>(old_top - top);
                total *= factor;
                for (int64_t e = 0; e < sizes.wide_e; ++e) {
                    float* sums = scratch.sums + e * kQueries + column;
                    store(sums, load(sums) * factor);
                }
            }
            top = top == -INFINITY ? spread(0.f) : top;  // sees nothing yet
            float16 totals[2] = {};
            for (int64_t s = 0; s < kKeys; s += 2) {
                const float16 w0 = exp2_of<kTerms>(load(scores + s * kQueries) * scale - top);
                const float16 w1 = exp2_of<kTerms>(load(scores + (s + 1) * kQueries) * scale - top);
                totals[0] += w0, totals[1] += w1;
                if constexpr (kPair<Y> == 2) {
                    store_pairs(scratch.weights + s * kQueries + 2 * column, w0, w1);
                } else {
                    store(scratch.weights + s * kQueries + column, w0);
                    store(scratch.weights + (s + 1) * kQueries + column, w1);
                }
            }
            store(scratch.totals + column, total + (totals[0] + totals[1]));
        }
    }

    static bool is_any(int32x16 mask) {
        int32_t any = 0;
        for (int lane = 0; lane < 16; ++lane) any |= mask[lane];
        return any != 0;
    }

    void finish(int64_t b, int64_t kv_head, int64_t group, int64_t query, int64_t n, const Scratch& scratch) const {
        float* rows = scratch.sums + sizes.wide_e * kQueries;
        transpose_words(scratch.sums, rows, sizes.wide_e, kQueries);
        float* lse_T = lse + ((b * sizes.K + kv_head) * sizes.G + group) * sizes.T;
        for (int64_t t = 0; t < n; ++t) {
            const float total = scratch.totals[t], inverse = 1 / total;
            X* out_E = out.at(b, kv_head, group, query + t);
            int64_t e = 0;
            for (; e + 16 <= sizes.E; e += 16) store(out_E + e, load(rows + t * sizes.wide_e + e) * inverse);
            for (; e < sizes.E; ++e) out_E[e] = from_float<X>(rows[t * sizes.wide_e + e] * inverse);
            lse_T[query + t] = scratch.tops[t] / kLog2E + std::log(total);
        }
    }
};

// ----------------------------------------------------------------------------------------------------------- backward

template <class X, class Y>
struct Backward {
    static constexpr int kTerms = sizeof(X) == 2 ? 5 : 7;
    const Sizes& sizes;
    Rows<const X> q, k, v, out, grad;
    const float* lse;
    Rows<X> grad_q, grad_k, grad_v;
    int64_t n_parts;
    float* shared_grad_q;  // (n_parts, B, K, G, tiles, H, kQueries) where several threads share a head, else null

    int64_t n_padded() const { return sizes.n_query_tiles * kQueries; }
    // Of the gradient of one head's queries.
    int64_t n_grad_q() const { return sizes.G * n_padded() * sizes.wide_h; }

    struct Scratch {
        // Of all queries, tile by tile: as a second factor with the width as inner size, and with the queries.
        Y *q_columns, *q_pairs, *grad_columns, *grad_pairs;
        float *lse, *share, *grad_q;
        // Of one tile of keys.
        Y *k_rows, *k_columns, *v_rows;
        float *grad_k, *grad_v;
        // Of one tile of both.
        float *scores, *grad_weights;
        Y *weights, *grad_scores, *grad_score_pairs, *rows;
        int64_t n_bytes;

        Scratch(const Sizes& s, bool owns_grad_q, char* start) {
            Pieces pieces(start);
            const int64_t n_rows = s.G * s.n_query_tiles * kQueries;
            q_columns = pieces.take<Y>(n_rows * s.wide_h), q_pairs = pieces.take<Y>(n_rows * s.wide_h);
            grad_columns = pieces.take<Y>(n_rows * s.wide_e), grad_pairs = pieces.take<Y>(n_rows * s.wide_e);
            lse = pieces.take<float>(n_rows), share = pieces.take<float>(n_rows);
            grad_q = pieces.take<float>(owns_grad_q ? n_rows * s.wide_h : 0);
            k_rows = pieces.take<Y>(kKeys * s.wide_h), k_columns = pieces.take<Y>(kKeys * s.wide_h);
            v_rows = pieces.take<Y>(kKeys * s.wide_e);
            grad_k = pieces.take<float>(kKeys * s.wide_h), grad_v = pieces.take<float>(kKeys * s.wide_e);
            scores = pieces.take<float>(kKeys * kQueries), grad_weights = pieces.take<float>(kKeys * kQueries);
            weights = pieces.take<Y>(kKeys * kQueries), grad_scores = pieces.take<Y>(kKeys * kQueries);
            grad_score_pairs = pieces.take<Y>(kKeys * kQueries);
            rows = pieces.take<Y>(std::max({kKeys * s.wide_h, kKeys * s.wide_e, 2 * kQueries * s.wide_h}));
            n_bytes = pieces.n_bytes_since(start);
        }
    };

    // Every n_parts-th tile of the keys of one head.
    void run(int64_t item, char* memory) const {
        const int64_t head = item / n_parts, part = item % n_parts, b = head / sizes.K, kv_head = head % sizes.K;
        Scratch scratch(sizes, shared_grad_q == nullptr, memory);
        if (shared_grad_q != nullptr)
            scratch.grad_q = shared_grad_q + (part * sizes.B * sizes.K + head) * n_grad_q();
        std::fill_n(scratch.grad_q, n_grad_q(), 0.f);
        for (int64_t group = 0; group < sizes.G; ++group)
            for (int64_t query = 0; query < sizes.T; query += kQueries) arrange(b, kv_head, group, query, scratch);
        for (int64_t tile = part; tile < sizes.n_key_tiles; tile += n_parts) visit(b, kv_head, tile * kKeys, scratch);
        if (shared_grad_q == nullptr)
            for (int64_t group = 0; group < sizes.G; ++group)
                for (int64_t query = 0; query < sizes.T; query += kQueries)
                    write_grad_q(b, kv_head, group, query, scratch.grad_q, reinterpret_cast<float*>(scratch.rows));
        if (sizes.has_amx) at::native::cpublas::brgemm_release(true);
    }

    void arrange(int64_t b, int64_t kv_head, int64_t group, int64_t query, const Scratch& scratch) const {
        const int64_t n = std::min(kQueries, sizes.T - query), place = group * n_padded() + query;
        copy_rows(q.at(b, kv_head, group, query), q.row, n, sizes.H, scratch.rows, kQueries, sizes.wide_h);
        transpose_words(scratch.rows, scratch.q_columns + place * sizes.wide_h, kQueries, sizes.wide_h / kPair<Y>);
        make_pairs(scratch.rows, scratch.q_pairs + place * sizes.wide_h, kQueries, sizes.wide_h);
        const X* grad_TE = grad.at(b, kv_head, group, query);
        copy_rows(grad_TE, grad.row, n, sizes.E, scratch.rows, kQueries, sizes.wide_e);
        transpose_words(scratch.rows, scratch.grad_columns + place * sizes.wide_e, kQueries, sizes.wide_e / kPair<Y>);
        make_pairs(scratch.rows, scratch.grad_pairs + place * sizes.wide_e, kQueries, sizes.wide_e);
        const float* lse_T = lse + ((b * sizes.K + kv_head) * sizes.G + group) * sizes.T + query;
        const X* out_TE = out.at(b, kv_head, group, query);
        for (int64_t t = 0; t < kQueries; ++t) {
            float16 sums = {};
            float rest = 0;
            if (t < n) {
                int64_t e = 0;
                for (; e + 16 <= sizes.E; e += 16) sums += load(grad_TE + t * grad.row + e) * load(out_TE + t * out.row + e);
                for (; e < sizes.E; ++e) rest += to_float(grad_TE[t * grad.row + e]) * to_float(out_TE[t * out.row + e]);
            }
            scratch.share[place + t] = sum(sums) + rest;
            scratch.lse[place + t] = t < n ? lse_T[t] * kLog2E : INFINITY;
        }
    }

    void visit(int64_t b, int64_t kv_head, int64_t key, const Scratch& scratch) const {
        const int64_t n = std::min(kKeys, sizes.S - key);
        copy_rows(k.at(b, kv_head, 0, key), k.row, n, sizes.H, scratch.k_rows, kKeys, sizes.wide_h);
        copy_rows(v.at(b, kv_head, 0, key), v.row, n, sizes.E, scratch.v_rows, kKeys, sizes.wide_e);
        make_pairs(scratch.k_rows, scratch.rows, kKeys, sizes.wide_h);
        transpose_words(scratch.rows, scratch.k_columns, kKeys / kPair<Y>, sizes.wide_h);
        bool is_first = true;
        for (int64_t group = 0; group < sizes.G; ++group) {
            const int64_t start = std::max<int64_t>(0, key - sizes.n_past) / kQueries * kQueries;
            for (int64_t query = start; query < sizes.T && sizes.first_of(b, query) < key + kKeys; query += kQueries) {
                add_tile(b, key, query, group * n_padded() + query, scratch, is_first);
                is_first = false;
            }
        }
        if (is_first) {
            std::fill_n(scratch.grad_k, kKeys * sizes.wide_h, 0.f);
            std::fill_n(scratch.grad_v, kKeys * sizes.wide_e, 0.f);
        }
        write_rows(scratch.grad_k, sizes.wide_h, sizes.scale, grad_k.at(b, kv_head, 0, key), grad_k.row, n, sizes.H);
        write_rows(scratch.grad_v, sizes.wide_e, 1.f, grad_v.at(b, kv_head, 0, key), grad_v.row, n, sizes.E);
    }

    void add_tile(int64_t b, int64_t key, int64_t query, int64_t place, const Scratch& scratch, bool is_first) const {
        const bool amx = sizes.has_amx;
        const int64_t h = sizes.wide_h, e = sizes.wide_e;
        multiply(kKeys, kQueries, h, scratch.k_rows, scratch.q_columns + place * h, scratch.scores, false, amx);
        if (!sizes.is_all_seen(b, key, query)) hide(sizes, b, key, query, scratch.scores);
        multiply(kKeys, kQueries, e, scratch.v_rows, scratch.grad_columns + place * e, scratch.grad_weights, false, amx);
        differentiate(place, scratch);
        multiply(kKeys, e, kQueries, scratch.weights, scratch.grad_pairs + place * e, scratch.grad_v, !is_first, amx);
        multiply(kKeys, h, kQueries, scratch.grad_scores, scratch.q_pairs + place * h, scratch.grad_k, !is_first, amx);
        multiply(h, kQueries, kKeys, scratch.k_columns, scratch.grad_score_pairs, scratch.grad_q + place * h, true, amx);
    }

    // Weights again, and from the gradients of weights those of scores.
    void differentiate(int64_t place, const Scratch& scratch) const {
        const float scale = sizes.scale * kLog2E;
        for (int64_t column = 0; column < kQueries; column += 16) {
            const float16 lse_Q = load(scratch.lse + place + column), share_Q = load(scratch.share + place + column);
            for (int64_t s = 0; s < kKeys; s += 2) {
                float16 grads[2];
                for (int i = 0; i < 2; ++i) {
                    const int64_t at = (s + i) * kQueries + column;
                    const float16 w = exp2_of<kTerms>(load(scratch.scores + at) * scale - lse_Q);
                    grads[i] = w * (load(scratch.grad_weights + at) - share_Q);
                    store(scratch.weights + at, w);
                    store(scratch.grad_scores + at, grads[i]);
                    if constexpr (kPair<Y> == 1) store(scratch.grad_score_pairs + at, grads[i]);
                }
                if constexpr (kPair<Y> == 2)
                    store_pairs(scratch.grad_score_pairs + s * kQueries + 2 * column, grads[0], grads[1]);
            }
        }
    }

    static void write_rows(const float* from, int64_t width, float factor, X* to, int64_t stride, int64_t n, int64_t w) {
        for (int64_t row = 0; row < n; ++row) {
            int64_t i = 0;
            for (; i + 16 <= w; i += 16) store(to + row * stride + i, load(from + row * width + i) * factor);
            for (; i < w; ++i) to[row * stride + i] = from_float<X>(from[row * width + i] * factor);
        }
    }

    void write_grad_q(int64_t b, int64_t kv_head, int64_t group, int64_t query, const float* head, float* rows) const {
        transpose_words(head + (group * n_padded() + query) * sizes.wide_h, rows, sizes.wide_h, kQueries);
        write_rows(rows, sizes.wide_h, sizes.scale, grad_q.at(b, kv_head, group, query), grad_q.row,
                   std::min(kQueries, sizes.T - query), sizes.H);
    }

    // One tile of queries: the parts together, in their order.
    void add_parts(int64_t item, char* memory) const {
        const int64_t query = item % sizes.n_query_tiles * kQueries, group = item / sizes.n_query_tiles % sizes.G;
        const int64_t head = item / sizes.n_query_tiles / sizes.G, n = kQueries * sizes.wide_h;
        float* first = shared_grad_q + head * n_grad_q();
        for (int64_t part = 1; part < n_parts; ++part) {
            float* total = first + (group * n_padded() + query) * sizes.wide_h;
            const float* other = total + part * sizes.B * sizes.K * n_grad_q();
            for (int64_t i = 0; i < n; ++i) total[i] += other[i];
        }
        write_grad_q(head / sizes.K, head % sizes.K, group, query, first, reinterpret_cast<float*>(memory));
    }
};

// ---------------------------------------------------------------------------------------------------------- operators

Sizes check_sizes(
    const StridedView& q, const StridedView& k, const StridedView& v, const std::optional<View>& first, double scale,
    bool has_amx) {
    check(q.n_dims == 5 && k.n_dims == 4 && v.n_dims == 4, "q must have 5 dimensions, k and v 4");
    check(k.sizes[0] == q.sizes[0] && k.sizes[1] == q.sizes[1] && std::equal(k.sizes, k.sizes + 3, v.sizes) &&
              k.sizes[3] == q.sizes[4] && q.sizes[3] <= k.sizes[2],
          "the shapes of q, k and v must fit together");
    check(k.dtype == q.dtype && v.dtype == q.dtype, "q, k and v must have one dtype");
    check(q.dtype == kBFloat16 || q.dtype == kFloat32, "q, k and v must be float32 or bfloat16");
    check(!first || (first->n_dims == 2 && first->dtype == aoti_torch_dtype_int64() && first->sizes[1] == q.sizes[3] &&
                     (first->sizes[0] == 1 || first->sizes[0] == q.sizes[0])),
          "first_visible must be int64, one number for each query");
    check(scale > 0, "scale must be positive");
    for (int64_t d = 0; d < 5; ++d) check(q.sizes[d] > 0, "no size may be 0");
    return Sizes(q, k, v, first ? &*first : nullptr, scale, has_amx);
}

std::optional<View> view_of(const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<View>(View(tensor->get())) : std::nullopt;
}

template <class X, class Y>
void run_forward(const Sizes& sizes, const StridedView& q, const StridedView& k, const StridedView& v, const StridedView& out, float* lse) {
    const int64_t n_parts = n_sharing(sizes, torch::stable::get_num_threads(), sizes.n_query_tiles);
    const Forward<X, Y> forward{sizes, Rows<const X>(q), Rows<const X>(k), Rows<const X>(v), Rows<X>(out), lse, n_parts};
    for_each_item(sizes.B * sizes.K * n_parts, typename Forward<X, Y>::Scratch(sizes, nullptr).n_bytes,
                  [&](int64_t item, char* memory) { forward.run(item, memory); });
}

// products: 0 in float32, 1 of bfloat16 pairs, 2 of bfloat16 pairs by AMX.
void forward(
    Tensor q_BKGTH, Tensor k_BKSH, Tensor v_BKSE, std::optional<Tensor> first_visible_BT, double scale, int64_t products,
    Tensor out_BKGTE, Tensor lse_BKGT) {
    const StridedView q(q_BKGTH.get()), k(k_BKSH.get()), v(v_BKSE.get()), out(out_BKGTE.get());
    const View lse(lse_BKGT.get());
    const std::optional<View> first = view_of(first_visible_BT);
    const Sizes sizes = check_sizes(q, k, v, first, scale, products == 2);
    float* lse_data = static_cast<float*>(lse.data);
    if (q.dtype == kFloat32) run_forward<float, float>(sizes, q, k, v, out, lse_data);
    else if (products == 0) run_forward<bf16, float>(sizes, q, k, v, out, lse_data);
    else run_forward<bf16, bf16>(sizes, q, k, v, out, lse_data);
}

template <class X, class Y>
void run_backward(
    const Sizes& sizes, const StridedView& q, const StridedView& k, const StridedView& v, const StridedView& out,
    const StridedView& grad, const float* lse, const StridedView& grad_q, const StridedView& grad_k, const StridedView& grad_v) {
    const int64_t n_parts = n_sharing(sizes, torch::stable::get_num_threads(), sizes.n_key_tiles);
    Backward<X, Y> backward{
        sizes, Rows<const X>(q), Rows<const X>(k), Rows<const X>(v), Rows<const X>(out), Rows<const X>(grad), lse,
        Rows<X>(grad_q), Rows<X>(grad_k), Rows<X>(grad_v), n_parts, nullptr};
    std::unique_ptr<float, decltype(&std::free)> parts(nullptr, &std::free);
    const int64_t n_heads = sizes.B * sizes.K;
    if (n_parts > 1) {
        parts.reset(static_cast<float*>(std::aligned_alloc(64, round_up(n_parts * n_heads * backward.n_grad_q() * 4, 64))));
        check(parts != nullptr, "there must be memory for the queries' gradients");
        backward.shared_grad_q = parts.get();
    }
    for_each_item(n_heads * n_parts, typename Backward<X, Y>::Scratch(sizes, n_parts == 1, nullptr).n_bytes,
                  [&](int64_t item, char* memory) { backward.run(item, memory); });
    if (n_parts > 1)
        for_each_item(n_heads * sizes.G * sizes.n_query_tiles, kQueries * sizes.wide_h * 4,
                      [&](int64_t item, char* memory) { backward.add_parts(item, memory); });
}

void backward(
    Tensor q_BKGTH, Tensor k_BKSH, Tensor v_BKSE, std::optional<Tensor> first_visible_BT, double scale, int64_t products,
    Tensor out_BKGTE, Tensor lse_BKGT, Tensor grad_BKGTE, Tensor grad_q_BKGTH, Tensor grad_k_BKSH, Tensor grad_v_BKSE) {
    const StridedView q(q_BKGTH.get()), k(k_BKSH.get()), v(v_BKSE.get()), out(out_BKGTE.get()), grad(grad_BKGTE.get());
    const StridedView grad_q(grad_q_BKGTH.get()), grad_k(grad_k_BKSH.get()), grad_v(grad_v_BKSE.get());
    const View lse(lse_BKGT.get());
    const std::optional<View> first = view_of(first_visible_BT);
    const Sizes sizes = check_sizes(q, k, v, first, scale, products == 2);
    const float* lse_data = static_cast<const float*>(lse.data);
    if (q.dtype == kFloat32) run_backward<float, float>(sizes, q, k, v, out, grad, lse_data, grad_q, grad_k, grad_v);
    else if (products == 0) run_backward<bf16, float>(sizes, q, k, v, out, grad, lse_data, grad_q, grad_k, grad_v);
    else run_backward<bf16, bf16>(sizes, q, k, v, out, grad, lse_data, grad_q, grad_k, grad_v);
}

bool has_pairs() { return kHasPairs; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hydra, library) {
    library.def(
        "tiled_attention_forward_(Tensor q, Tensor k, Tensor v, Tensor? first_visible, float scale, int products, "
        "Tensor(a!) out, Tensor(b!) lse) -> ()");
    library.def(
        "tiled_attention_backward_(Tensor q, Tensor k, Tensor v, Tensor? first_visible, float scale, int products, "
        "Tensor out, Tensor lse, Tensor grad, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()");
    library.def("tiled_attention_has_pairs() -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(hydra, CPU, library) {
    library.impl("tiled_attention_forward_", TORCH_BOX(&forward));
    library.impl("tiled_attention_backward_", TORCH_BOX(&backward));
}
STABLE_TORCH_LIBRARY_IMPL(hydra, CompositeExplicitAutograd, library) {
    library.impl("tiled_attention_has_pairs", TORCH_BOX(&has_pairs));
}
