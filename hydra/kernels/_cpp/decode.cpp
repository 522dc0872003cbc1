// Matrix products and attention for the few tokens of a decode step, which are bound by how fast memory is read.
//
// One token uses each weight once, so what counts is that weights arrive at the speed of the cache they lie in: rows are
// read in order by every thread and asked for ahead of time, across page borders, where the hardware's own prefetching
// stops. Threads wait for each other by spinning for a while before they sleep: a step has tens of products of a few
// microseconds each, and waking a sleeping thread takes longer than one of them.
//
// B rows of x (streams), I inputs, O outputs; N query heads, K key/value heads, H head width, S tokens that a cache holds.

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---------------------------------------------------------------------------------------------------------- threads

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Runs the parts of a task on the calling thread and on helpers. Each takes the next part that nobody has taken, so the
// caller waits for a helper only while that helper works: one that sleeps, or that another process keeps from running,
// costs its help and nothing more. Helpers sleep when nothing has come for about a millisecond.
class Team {
  public:
    explicit Team(int n_threads) : n_threads_(n_threads) {
        for (int index = 1; index < n_threads; ++index) std::thread([this] { help(); }).detach();
    }

    int n_threads() const { return n_threads_; }

    // Calls task(part, n_parts) for every part.
    template <class Task>
    void run(int n_parts, const Task& task) {
        if (n_threads_ == 1 || n_parts == 1) {
            for (int part = 0; part < n_parts; ++part) task(part, n_parts);
            return;
        }
        std::lock_guard<std::mutex> one_caller(caller_);
        call_.store([](const void* task, int part, int n) { (*static_cast<const Task*>(task))(part, n); });
        task_.store(&task);
        n_done_.store(0);
        const uint64_t round = (state_.load() >> 32) + 1;
        state_.store(round << 32 | static_cast<uint64_t>(n_parts) << 16);
        if (n_asleep_.load() > 0) {
            std::lock_guard<std::mutex> lock(sleep_);
            wake_.notify_all();
        }
        while (take_part()) {
        }
        for (int spins = 0; n_done_.load(std::memory_order_acquire) < n_parts; ++spins) {
            if (spins < kSpins) pause();
            else sched_yield();
        }
    }

  private:
    static constexpr int kSpins = 20000;

    // Does one part of the present round, if there is one left. The state is the number of the round, of its parts and of
    // those taken, so taking one fails when the round is over, and what was read of the task is of this round.
    bool take_part() {
        uint64_t state = state_.load(std::memory_order_acquire);
        for (;;) {
            const int part = static_cast<int>(state & 0xffff), n_parts = static_cast<int>(state >> 16 & 0xffff);
            const auto call = call_.load();
            const void* task = task_.load();
            if (part >= n_parts) return false;
            if (state_.compare_exchange_weak(state, state + 1)) {
                call(task, part, n_parts);
                n_done_.fetch_add(1, std::memory_order_release);
                return true;
            }
        }
    }

    void help() {
        uint64_t round = 0;
        for (;;) {
            for (int spins = 0; (state_.load(std::memory_order_acquire) >> 32) == round && spins < kSpins; ++spins) pause();
            if ((state_.load() >> 32) == round) {
                std::unique_lock<std::mutex> lock(sleep_);
                n_asleep_.fetch_add(1);
                wake_.wait(lock, [&] { return (state_.load() >> 32) != round; });
                n_asleep_.fetch_sub(1);
            }
            round = state_.load() >> 32;
            while (take_part()) {
            }
        }
    }

    const int n_threads_;
    std::atomic<void (*)(const void*, int, int)> call_{nullptr};
    std::atomic<const void*> task_{nullptr};
    std::atomic<int> n_done_{0}, n_asleep_{0};
    std::atomic<uint64_t> state_{0};
    std::mutex caller_, sleep_;
    std::condition_variable wake_;
};

std::atomic<int> wanted_threads{1};
std::atomic<Team*> current_team{nullptr};

// Helpers never end, so a team that is replaced (or lost in a fork) is left to sleep.
Team& team() {
    Team* now = current_team.load(std::memory_order_acquire);
    if (now != nullptr && now->n_threads() == wanted_threads.load(std::memory_order_relaxed)) return *now;
    static std::mutex making;
    std::lock_guard<std::mutex> lock(making);
    static const int at_fork = pthread_atfork(nullptr, nullptr, [] { current_team.store(nullptr); });
    (void)at_fork;
    now = current_team.load();
    if (now == nullptr || now->n_threads() != wanted_threads.load()) current_team.store(now = new Team(wanted_threads.load()));
    return *now;
}

void set_threads(int64_t n_threads) { wanted_threads.store(static_cast<int>(n_threads)); }

// ------------------------------------------------------------------------------------------------------------ numbers

struct bf16 {
    uint16_t bits;
};

float to_float(float value) { return value; }
float to_float(bf16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

template <class T>
T from_float(float value);
template <>
float from_float<float>(float value) {
    return value;
}
template <>
bf16 from_float<bf16>(float value) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if (value != value) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// 16 numbers; the compiler makes of them what the processor has.
typedef float float16 __attribute__((vector_size(64)));
typedef uint32_t uint32x16 __attribute__((vector_size(64)));
typedef uint16_t uint16x16 __attribute__((vector_size(32)));

float16 load(const float* from) {
    float16 values;
    std::memcpy(&values, from, sizeof values);
    return values;
}
float16 load(const bf16* from) {
    uint16x16 bits;
    std::memcpy(&bits, from, sizeof bits);
    return std::bit_cast<float16>(__builtin_convertvector(bits, uint32x16) << 16);
}
float sum(float16 values) {
    float total = 0;
    for (int lane = 0; lane < 16; ++lane) total += values[lane];
    return total;
}

// ----------------------------------------------------------------------------------------------------- matrix product

constexpr int64_t kAhead = 6144;  // bytes that are asked for before they are used
constexpr int64_t kLine = 64;

// Asks for what lies kAhead behind the next n_bytes.
inline void prefetch(const void* from, int64_t n_bytes) {
    const char* start = static_cast<const char*>(from) + kAhead;
    for (int64_t offset = 0; offset < n_bytes; offset += kLine) __builtin_prefetch(start + offset);
}

// out[r][b] = w[r] . x[b] for R rows of weights and C rows of x.
template <int R, int C, class W>
inline void dot_rows(const W* w, const W* x, int64_t n_in, float out[R][C]) {
    float16 sums[R][C] = {};
    int64_t i = 0;
    for (; i + 16 <= n_in; i += 16) {
        prefetch(w + R * i, R * 16 * sizeof(W));
        float16 x_c[C];
        for (int c = 0; c < C; ++c) x_c[c] = load(x + c * n_in + i);
        for (int r = 0; r < R; ++r) {
            const float16 w_r = load(w + r * n_in + i);
            for (int c = 0; c < C; ++c) sums[r][c] += w_r * x_c[c];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            float rest = 0;
            for (int64_t j = i; j < n_in; ++j) rest += to_float(w[r * n_in + j]) * to_float(x[c * n_in + j]);
            out[r][c] = sum(sums[r][c]) + rest;
        }
}

#if defined(__AVX512BF16__)
// Products of bfloat16 pairs, added up in float32.
template <int R, int C>
inline void dot_rows(const bf16* w, const bf16* x, int64_t n_in, float out[R][C]) {
    __m512 sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
    auto step = [&](int64_t i, __mmask32 mask) __attribute__((always_inline)) {
        __m512bh x_c[C];
        for (int c = 0; c < C; ++c) x_c[c] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + c * n_in + i);
        for (int r = 0; r < R; ++r) {
            const __m512bh w_r = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + r * n_in + i);
            for (int c = 0; c < C; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], w_r, x_c[c]);
        }
    };
    int64_t i = 0;
    for (; i + 32 <= n_in; i += 32) {
        prefetch(w + R * i, R * 64);
        step(i, ~0u);
    }
    if (i < n_in) step(i, (1u << (n_in - i)) - 1);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) out[r][c] = _mm512_reduce_add_ps(sums[r][c]);
}
#endif

// Rows of x as 16-bit integers with one scale each: value = scale * (256 high + low). Finer than bfloat16 in the norm.
struct FixedPoint {
    std::vector<int16_t> values;
    std::vector<int8_t> high, low;
    std::vector<float> scales;
    std::vector<int64_t> sums;

    template <class X>
    void assign(const X* x, int64_t n_rows, int64_t n_in) {
        values.resize(n_rows * n_in), high.resize(n_rows * n_in + 64), low.resize(n_rows * n_in + 64);
        scales.resize(n_rows), sums.resize(n_rows);
        for (int64_t b = 0; b < n_rows; ++b) {
            const X* x_b = x + b * n_in;
            float top = 0;
            for (int64_t i = 0; i < n_in; ++i) top = std::max(top, std::fabs(to_float(x_b[i])));
            const float scale = top / 32512, inverse = top > 0 ? 32512 / top : 0;
            int64_t total = 0;
            for (int64_t i = 0; i < n_in; ++i) {
                const int value = static_cast<int>(std::nearbyint(to_float(x_b[i]) * inverse));
                const int high_digit = (value + 128) >> 8;
                values[b * n_in + i] = static_cast<int16_t>(value);
                high[b * n_in + i] = static_cast<int8_t>(high_digit);
                low[b * n_in + i] = static_cast<int8_t>(value - 256 * high_digit);
                total += value;
            }
            scales[b] = scale, sums[b] = total;
        }
    }
};

// out[r][b] = (w[r] - 128) . x[b] as whole numbers, for weights stored with 128 added.
template <int R, int C>
inline void dot_rows(const uint8_t* w, const FixedPoint& x, int64_t b, int64_t n_in, float out[R][C]) {
    int64_t totals[R][C];
#if defined(__AVX512VNNI__)
    __m512i highs[R][C], lows[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) highs[r][c] = lows[r][c] = _mm512_setzero_si512();
    auto step = [&](int64_t i, __mmask64 mask) __attribute__((always_inline)) {
        for (int c = 0; c < C; ++c) {
            const __m512i high = _mm512_maskz_loadu_epi8(mask, x.high.data() + (b + c) * n_in + i);
            const __m512i low = _mm512_maskz_loadu_epi8(mask, x.low.data() + (b + c) * n_in + i);
            for (int r = 0; r < R; ++r) {
                const __m512i w_r = _mm512_maskz_loadu_epi8(mask, w + r * n_in + i);
                highs[r][c] = _mm512_dpbusd_epi32(highs[r][c], w_r, high);
                lows[r][c] = _mm512_dpbusd_epi32(lows[r][c], w_r, low);
            }
        }
    };
    int64_t i = 0;
    for (; i + 64 <= n_in; i += 64) {
        prefetch(w + R * i, R * 64);
        step(i, ~0ull);
    }
    if (i < n_in) step(i, (1ull << (n_in - i)) - 1);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            totals[r][c] = 256 * static_cast<int64_t>(_mm512_reduce_add_epi32(highs[r][c])) + _mm512_reduce_add_epi32(lows[r][c]);
#else
    prefetch(w, R * n_in);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            totals[r][c] = 0;
            for (int64_t start = 0; start < n_in; start += 256) {  // 256 products fit into 32 bits
                int32_t part = 0;
                const int64_t stop = std::min(start + 256, n_in);
                for (int64_t i = start; i < stop; ++i)
                    part += static_cast<int16_t>(w[r * n_in + i]) * static_cast<int32_t>(x.values[(b + c) * n_in + i]);
                totals[r][c] += part;
            }
        }
#endif
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) out[r][c] = static_cast<float>(totals[r][c] - 128 * x.sums[b + c]);
}

template <class X>
struct Product {
    const X* x;
    const X* w;
    const uint8_t* w_fixed;  // instead of w
    const float* scales;     // of w_fixed, one for each output
    const FixedPoint* x_fixed;
    X* out;
    int64_t n_rows, n_in, n_out;

    template <int R, int C>
    void block(int64_t o, int64_t b) const {
        float dots[R][C];
        if (w_fixed == nullptr) {
            dot_rows<R, C>(w + o * n_in, x + b * n_in, n_in, dots);
        } else {
            dot_rows<R, C>(w_fixed + o * n_in, *x_fixed, b, n_in, dots);
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) {
                const float scale = w_fixed == nullptr ? 1.f : scales[o + r] * x_fixed->scales[b + c];
                out[(b + c) * n_out + o + r] = from_float<X>(dots[r][c] * scale);
            }
    }

    template <int R>
    void all_rows(int64_t o) const {
        int64_t b = 0;
        for (; b + 4 <= n_rows; b += 4) block<R, 4>(o, b);
        for (; b + 2 <= n_rows; b += 2) block<R, 2>(o, b);
        if (b < n_rows) block<R, 1>(o, b);
    }

    void outputs(int64_t start, int64_t stop) const {
        int64_t o = start;
        for (; o + 4 <= stop; o += 4) all_rows<4>(o);
        for (; o < stop; ++o) all_rows<1>(o);
    }
};

// Part `index` of n, in multiples of `step`.
std::pair<int64_t, int64_t> part(int64_t count, int64_t step, int index, int n) {
    const int64_t n_steps = (count + step - 1) / step;
    return {std::min(count, n_steps * index / n * step), std::min(count, n_steps * (index + 1) / n * step)};
}

// Two for each thread, so that one that comes late still finds work.
int n_parts(int64_t count) { return static_cast<int>(std::clamp<int64_t>(count, 1, 2 * team().n_threads())); }

template <class X>
void multiply(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale, Tensor& out) {
    Product<X> product{};
    product.x = static_cast<const X*>(x.data_ptr());
    product.out = static_cast<X*>(out.data_ptr());
    product.n_in = weight.size(1), product.n_out = weight.size(0), product.n_rows = x.numel() / weight.size(1);
    thread_local FixedPoint x_fixed;
    if (scale.has_value()) {
        x_fixed.assign(product.x, product.n_rows, product.n_in);
        product.x_fixed = &x_fixed;
        product.w_fixed = static_cast<const uint8_t*>(weight.data_ptr());
        product.scales = static_cast<const float*>(scale->data_ptr());
    } else {
        product.w = static_cast<const X*>(weight.data_ptr());
    }
    team().run(n_parts(product.n_out / 4), [&](int index, int n) {
        const auto [start, stop] = part(product.n_out, 4, index, n);
        product.outputs(start, stop);
    });
}

void check(bool holds, const char* what) {
    if (!holds) throw std::runtime_error(what);
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> scale) {
    check(x.is_contiguous() && weight.is_contiguous() && weight.dim() == 2, "x and weight must be contiguous");
    check(x.size(-1) == weight.size(1), "the last size of x must be that of weight");
    check(weight.scalar_type() == (scale.has_value() ? ScalarType::Byte : x.scalar_type()), "weight has another dtype");
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = weight.size(0);
    Tensor out = torch::stable::new_empty(x, shape);
    if (x.scalar_type() == ScalarType::BFloat16) {
        multiply<bf16>(x, weight, scale, out);
    } else {
        check(x.scalar_type() == ScalarType::Float, "x must be bfloat16 or float32");
        multiply<float>(x, weight, scale, out);
    }
    return out;
}

// ---------------------------------------------------------------------------------------------------------- attention

template <class X>
struct Attention {
    const X *q, *k, *v, *mask;
    X* out;
    int64_t n_heads, n_kv_heads, max_keys, width, mask_stride;

    // One query head: scores, softmax, weighted values; all in float32. Keys after the last visible one are not read.
    void head(int64_t index) const {
        const int64_t row = index / n_heads, kv_head = index % n_heads / (n_heads / n_kv_heads);
        const X* q_H = q + index * width;
        const X* k_SH = k + (row * n_kv_heads + kv_head) * max_keys * width;
        const X* v_SH = v + (row * n_kv_heads + kv_head) * max_keys * width;
        const X* mask_S = mask + row * mask_stride;
        int64_t n_keys = max_keys;
        while (n_keys > 0 && to_float(mask_S[n_keys - 1]) == -INFINITY) --n_keys;
        thread_local std::vector<float> weights, sums;
        weights.resize(n_keys), sums.assign(width, 0.f);
        const float scale = 1 / std::sqrt(static_cast<float>(width));
        float top = std::numeric_limits<float>::lowest();
        for (int64_t s = 0; s < n_keys; ++s) {
            float dot[1][1];
            dot_rows<1, 1>(k_SH + s * width, q_H, width, dot);
            weights[s] = dot[0][0] * scale + to_float(mask_S[s]);
            top = std::max(top, weights[s]);
        }
        float total = 0;
        for (int64_t s = 0; s < n_keys; ++s) total += weights[s] = std::exp(weights[s] - top);
        for (int64_t s = 0; s < n_keys; ++s) {
            if (weights[s] == 0) continue;
            int64_t h = 0;
            for (; h + 16 <= width; h += 16) {
                const float16 updated = load(sums.data() + h) + weights[s] * load(v_SH + s * width + h);
                std::memcpy(sums.data() + h, &updated, sizeof updated);
            }
            for (; h < width; ++h) sums[h] += weights[s] * to_float(v_SH[s * width + h]);
        }
        for (int64_t h = 0; h < width; ++h) out[index * width + h] = from_float<X>(total > 0 ? sums[h] / total : 0.f);
    }
};

template <class X>
void attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, Tensor& out) {
    const Attention<X> attention{
        static_cast<const X*>(q.data_ptr()),    static_cast<const X*>(k.data_ptr()), static_cast<const X*>(v.data_ptr()),
        static_cast<const X*>(mask.data_ptr()), static_cast<X*>(out.data_ptr()),     q.size(1),
        k.size(1),                              k.size(2),                           q.size(3),
        mask.size(0) == 1 ? 0 : k.size(2)};
    team().run(n_parts(q.size(0) * q.size(1)), [&](int index, int n) {
        const auto [start, stop] = part(q.size(0) * q.size(1), 1, index, n);
        for (int64_t head = start; head < stop; ++head) attention.head(head);
    });
}

Tensor attention(Tensor q_BN1H, Tensor k_BKSH, Tensor v_BKSH, Tensor mask_B11S) {
    check(q_BN1H.is_contiguous() && k_BKSH.is_contiguous() && v_BKSH.is_contiguous() && mask_B11S.is_contiguous(),
          "q, k, v and mask must be contiguous");
    check(q_BN1H.size(2) == 1 && mask_B11S.numel() == mask_B11S.size(0) * k_BKSH.size(2), "there must be one query token");
    const ScalarType dtype = q_BN1H.scalar_type();
    check(k_BKSH.scalar_type() == dtype && v_BKSH.scalar_type() == dtype && mask_B11S.scalar_type() == dtype,
          "q, k, v and mask must have one dtype");
    Tensor out = torch::stable::new_empty(q_BN1H, std::vector<int64_t>(q_BN1H.sizes().begin(), q_BN1H.sizes().end()));
    if (dtype == ScalarType::BFloat16) {
        attend<bf16>(q_BN1H, k_BKSH, v_BKSH, mask_B11S, out);
    } else {
        check(dtype == ScalarType::Float, "q must be bfloat16 or float32");
        attend<float>(q_BN1H, k_BKSH, v_BKSH, mask_B11S, out);
    }
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(hydra_decode, library) {
    library.def("linear(Tensor x, Tensor weight, Tensor? scale) -> Tensor");
    library.def("attention(Tensor q, Tensor k, Tensor v, Tensor mask) -> Tensor");
    library.def("set_threads(int n_threads) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(hydra_decode, CPU, library) {
    library.impl("linear", TORCH_BOX(&linear));
    library.impl("attention", TORCH_BOX(&attention));
}
STABLE_TORCH_LIBRARY_IMPL(hydra_decode, CompositeExplicitAutograd, library) {
    library.impl("set_threads", TORCH_BOX(&set_threads));
}
