// Matrix products and attention for the few tokens of a decode step, which are bound by how fast memory is read.
//
// One token uses each weight once, so what counts is that weights arrive at the speed of the cache they lie in: rows are
// read in order by every thread and asked for ahead of time, across page borders, where the hardware's own prefetching
// stops. Threads wait for each other by spinning for a while before they sleep: a step has tens of products of a few
// microseconds each, and waking a sleeping thread takes longer than one of them.
//
// B rows of x (streams), I inputs, O outputs; N query heads, K key/value heads, H head width (E that of values), S tokens
// that a cache holds.

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdio>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "tiles.h"

#if defined(__AMX_BF16__)
namespace at::cpu {  // of libtorch_cpu: asks the system for the use of tiles; false where it has none
bool init_amx();
}
#endif

namespace {

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

// ----------------------------------------------------------------------------------------------------- matrix product

constexpr int64_t kAhead = 6144;  // bytes that are asked for before they are used
constexpr int64_t kLine = 64;

// Asks for what lies kAhead behind the next n_bytes.
inline void prefetch(const void* from, int64_t n_bytes) {
    const char* start = static_cast<const char*>(from) + kAhead;
    for (int64_t offset = 0; offset < n_bytes; offset += kLine) __builtin_prefetch(start + offset);
}

// out[r][b] = w[r] . x[b] for R rows of weights and C rows of x. Asks for the weights that lie ahead, unless told not to.
template <int R, int C, bool kAsks = true, class W>
inline void dot_rows(const W* w, const W* x, int64_t n_in, float out[R][C]) {
    float16 sums[R][C] = {};
    int64_t i = 0;
    for (; i + 16 <= n_in; i += 16) {
        if (kAsks) prefetch(w + R * i, R * 16 * sizeof(W));
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

#if defined(__AVX512F__)
// Where a row is as short as these are, adding up its lanes takes as long as its products: four rows go together.
inline void sum_lanes(const __m512 rows[4], float out[4]) {
    const __m512 r01 = _mm512_add_ps(_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[0], rows[1]));
    const __m512 r23 = _mm512_add_ps(_mm512_unpacklo_ps(rows[2], rows[3]), _mm512_unpackhi_ps(rows[2], rows[3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(r01), _mm512_castps_pd(r23));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(r01), _mm512_castps_pd(r23));
    const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 halves = _mm256_add_ps(
        _mm512_castps512_ps256(quarters), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(quarters), 1)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
inline void sum_lanes(const __m512i rows[4], int32_t out[4]) {
    const __m512i r01 = _mm512_add_epi32(_mm512_unpacklo_epi32(rows[0], rows[1]), _mm512_unpackhi_epi32(rows[0], rows[1]));
    const __m512i r23 = _mm512_add_epi32(_mm512_unpacklo_epi32(rows[2], rows[3]), _mm512_unpackhi_epi32(rows[2], rows[3]));
    const __m512i quarters = _mm512_add_epi32(_mm512_unpacklo_epi64(r01, r23), _mm512_unpackhi_epi64(r01, r23));
    const __m256i halves = _mm256_add_epi32(_mm512_castsi512_si256(quarters), _mm512_extracti64x4_epi64(quarters, 1));
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(out), _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}
template <int R, class Vector, class Number>
inline void sum_rows(const Vector (&rows)[R], Number (&out)[R]) {
    static_assert(R == 4 || R == 1);
    Vector four[4] = {rows[0]};
    Number sums[4];
    for (int r = 1; r < 4; ++r) four[r] = rows[R == 4 ? r : 0];
    sum_lanes(four, sums);
    std::copy_n(sums, R, out);
}
#endif

#if defined(__AVX512BF16__)
// Products of bfloat16 pairs, added up in float32.
template <int R, int C, bool kAsks = true>
inline void dot_rows(const bf16* w, const bf16* x, int64_t n_in, float out[R][C]) {
    __m512 sums[C][R];
    for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) sums[c][r] = _mm512_setzero_ps();
    auto step = [&](int64_t i, __mmask32 mask) __attribute__((always_inline)) {
        __m512bh x_c[C];
        for (int c = 0; c < C; ++c) x_c[c] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + c * n_in + i);
        for (int r = 0; r < R; ++r) {
            const __m512bh w_r = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + r * n_in + i);
            for (int c = 0; c < C; ++c) sums[c][r] = _mm512_dpbf16_ps(sums[c][r], w_r, x_c[c]);
        }
    };
    int64_t i = 0;
    for (; i + 32 <= n_in; i += 32) {
        if (kAsks) prefetch(w + R * i, R * 64);
        step(i, ~0u);
    }
    if (i < n_in) step(i, (1u << (n_in - i)) - 1);
    for (int c = 0; c < C; ++c) {
        float totals[R];
        sum_rows<R>(sums[c], totals);
        for (int r = 0; r < R; ++r) out[r][c] = totals[r];
    }
}
#endif

// Rows of x as 16-bit integers with one scale each: value = scale * (256 high + low). Finer than bfloat16 in the norm.
// The scale of a row that holds a NaN or an infinity is NaN, and with it everything that comes of the row.
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
            // 16 at a time by hand: a maximum is no sum, whose order the compiler may change.
            float16 tops = {};
            int32x16 is_bad = {};
            int64_t first = 0;
            for (; first + 16 <= n_in; first += 16) {
                const float16 x_i = load(x_b + first), size = x_i < 0 ? -x_i : x_i;
                tops = tops > size ? tops : size;
                is_bad |= std::bit_cast<uint32x16>(x_i) << 1 >= 0xff000000u;
            }
            float top = 0;
            bool has_bad = false;
            for (int lane = 0; lane < 16; ++lane) top = std::max(top, tops[lane]), has_bad |= is_bad[lane] != 0;
            for (; first < n_in; ++first) {
                const float size = std::fabs(to_float(x_b[first]));
                top = std::max(top, size), has_bad |= !std::isfinite(size);
            }
            if (has_bad) {
                std::fill_n(values.data() + b * n_in, n_in, 0);
                std::fill_n(high.data() + b * n_in, n_in, 0), std::fill_n(low.data() + b * n_in, n_in, 0);
                scales[b] = std::numeric_limits<float>::quiet_NaN(), sums[b] = 0;
                continue;
            }
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

constexpr int64_t kMostFixedInputs = 65536;  // products of 255 and 128 that fit into 32 bits

// out[r][b] = (w[r] - 128) . x[b] as whole numbers, for weights stored with 128 added.
template <int R, int C>
inline void dot_rows(const uint8_t* w, const FixedPoint& x, int64_t b, int64_t n_in, float out[R][C]) {
    int64_t totals[R][C];
#if defined(__AVX512VNNI__)
    __m512i highs[C][R], lows[C][R];
    for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) highs[c][r] = lows[c][r] = _mm512_setzero_si512();
    auto step = [&](int64_t i, __mmask64 mask) __attribute__((always_inline)) {
        for (int c = 0; c < C; ++c) {
            const __m512i high = _mm512_maskz_loadu_epi8(mask, x.high.data() + (b + c) * n_in + i);
            const __m512i low = _mm512_maskz_loadu_epi8(mask, x.low.data() + (b + c) * n_in + i);
            for (int r = 0; r < R; ++r) {
                const __m512i w_r = _mm512_maskz_loadu_epi8(mask, w + r * n_in + i);
                highs[c][r] = _mm512_dpbusd_epi32(highs[c][r], w_r, high);
                lows[c][r] = _mm512_dpbusd_epi32(lows[c][r], w_r, low);
            }
        }
    };
    int64_t i = 0;
    for (; i + 64 <= n_in; i += 64) {
        prefetch(w + R * i, R * 64);
        step(i, ~0ull);
    }
    if (i < n_in) step(i, (1ull << (n_in - i)) - 1);
    for (int c = 0; c < C; ++c) {
        int32_t high[R], low[R];
        sum_rows<R>(highs[c], high);
        sum_rows<R>(lows[c], low);
        for (int r = 0; r < R; ++r) totals[r][c] = 256 * static_cast<int64_t>(high[r]) + low[r];
    }
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

    // In blocks of four outputs; the last one may have fewer.
    int64_t n_blocks() const { return (n_out + 3) / 4; }

    void outputs(int64_t first_block, int64_t behind_last) const {
        int64_t o = 4 * first_block;
        const int64_t stop = std::min(n_out, 4 * behind_last);
        for (; o + 4 <= stop; o += 4) all_rows<4>(o);
        for (; o < stop; ++o) all_rows<1>(o);
    }
};

// Part `index` of n.
std::pair<int64_t, int64_t> part(int64_t count, int index, int n) { return {count * index / n, count * (index + 1) / n}; }

// Two for each thread, so that one that comes late still finds work.
int n_parts(int64_t count) { return static_cast<int>(std::clamp<int64_t>(count, 1, 2 * team().n_threads())); }

// One x times several matrices, as one task: their outputs come one behind the other.
template <class X>
void multiply(const View& x, const std::vector<View>& matrices, void* out) {
    const bool is_fixed = matrices[0].dtype == kUint8;
    Product<X> common{};
    common.x = static_cast<const X*>(x.data);
    common.n_in = matrices[0].sizes[1];
    common.n_rows = x.numel() / common.n_in;
    thread_local FixedPoint x_fixed;
    if (is_fixed) {
        x_fixed.assign(common.x, common.n_rows, common.n_in);
        common.x_fixed = &x_fixed;
    }
    std::vector<Product<X>> products;
    X* next = static_cast<X*>(out);
    int64_t n_blocks = 0;
    for (size_t m = 0; m < matrices.size(); m += is_fixed ? 2 : 1) {
        Product<X> product = common;
        product.n_out = matrices[m].sizes[0];
        product.out = next;
        if (is_fixed) {
            product.w_fixed = static_cast<const uint8_t*>(matrices[m].data);
            product.scales = static_cast<const float*>(matrices[m + 1].data);
        } else {
            product.w = static_cast<const X*>(matrices[m].data);
        }
        next += product.n_rows * product.n_out;
        n_blocks += product.n_blocks();
        products.push_back(product);
    }
    team().run(n_parts(n_blocks), [&](int index, int n) {
        auto [start, stop] = part(n_blocks, index, n);
        for (const Product<X>& product : products) {
            const int64_t here = product.n_blocks();
            if (start < here && stop > 0) product.outputs(std::max<int64_t>(start, 0), std::min(stop, here));
            start -= here, stop -= here;
        }
    });
}

AtenTensorHandle linear(AtenTensorHandle x_handle, const AtenTensorHandle* handles, int64_t n_handles) {
    const View x(x_handle);
    check(n_handles > 0, "there must be a matrix");
    std::vector<View> matrices;
    for (int64_t m = 0; m < n_handles; ++m) matrices.emplace_back(handles[m]);
    const bool is_fixed = matrices[0].dtype == kUint8;
    check(!is_fixed || n_handles % 2 == 0, "a uint8 matrix must be followed by its scales");
    int64_t n_out = 0;
    for (int64_t m = 0; m < n_handles; m += is_fixed ? 2 : 1) {
        const View& weight = matrices[m];
        check(weight.n_dims == 2 && x.n_dims > 0 && x.sizes[x.n_dims - 1] == weight.sizes[1] && weight.sizes[1] > 0,
              "the last size of x must be that of weight, and not 0");
        check(!is_fixed || weight.sizes[1] <= kMostFixedInputs, "uint8 weights must have at most 65536 inputs");
        check(weight.dtype == (is_fixed ? kUint8 : x.dtype), "weights must all have the dtype of x, or be uint8 with scales");
        check(!is_fixed || (matrices[m + 1].dtype == kFloat32 && matrices[m + 1].numel() == weight.sizes[0]),
              "scales must be float32, one for each output");
        n_out += weight.sizes[0];
    }
    const auto [out, data] = empty({x.numel() / matrices[0].sizes[1] * n_out}, x.dtype);
    if (x.dtype == kBFloat16) multiply<bf16>(x, matrices, data);
    else multiply<float>(x, matrices, data);
    return out;
}

// ---------------------------------------------------------------------------------------------------------- attention

constexpr int64_t kChunk = 512;  // keys of one work item; the same whatever the threads, so that these change no bit
constexpr int64_t kBlock = 64;   // keys whose values lie in the first cache by the time that they have weights

// Asks for the memory that is needed next. A few lines at a time and all the time: only so many can be on their way, so
// what is asked for in one go has the processor wait, and memory idles until the next time.
class Ahead {
  public:
    Ahead(const void* keys, int64_t key_bytes, const void* values, int64_t value_bytes)
        : next_(static_cast<const char*>(keys)), stop_(next_ + key_bytes), values_(static_cast<const char*>(values)),
          value_bytes_(value_bytes) {}

    void ask(int64_t n_lines) {
        for (; n_lines > 0 && next_ != nullptr; --n_lines) {
            __builtin_prefetch(next_, 0, 2);  // into the second cache: the first has too few places for what is under way
            if ((next_ += kLine) >= stop_) {
                next_ = std::exchange(values_, nullptr);
                stop_ = next_ + value_bytes_;
            }
        }
    }

  private:
    const char *next_, *stop_, *values_;
    int64_t value_bytes_;
};

// One block of keys and values for all query heads of a group by the processor's matrix unit, where it has one.
template <class X>
class GroupTiles {
  public:
    static bool take(int64_t, int64_t, int64_t) { return false; }
    GroupTiles(const X*, int64_t, int64_t, int64_t) {}
    void score(const X*, float, float*, Ahead&) const {}
    void add_values(const X*, const float*, const float*, float*, Ahead&) const {}
};

#if defined(__AMX_BF16__)
// It multiplies tiles of at most 16 rows of 64 bytes, the second of which holds pairs (row l: numbers 2 l and 2 l + 1 of
// each column).
template <>
class GroupTiles<bf16> {
    static constexpr int64_t kHeads = 16;

  public:
    // Below three heads a product of vectors takes less time than the tiles.
    static bool take(int64_t group, int64_t width, int64_t value_width) {
        static const bool is_allowed = at::cpu::init_amx();
        return is_allowed && group > 2 && group <= kHeads && width % 32 == 0 && value_width % 32 == 0;
    }

    GroupTiles(const bf16* q_GH, int64_t group, int64_t width, int64_t value_width)
        : group_(group), width_(width), value_width_(value_width), q_pairs_(kHeads * width / 2) {
        std::vector<uint32_t> rows(kHeads * width / 2);
        std::memcpy(rows.data(), q_GH, group * width * sizeof(bf16));
        transpose_words(rows.data(), q_pairs_.data(), kHeads, width / 2);
        alignas(64) struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        auto shape = [&](int tile, int64_t rows, int64_t row_bytes) {
            shapes.rows[tile] = static_cast<uint8_t>(rows), shapes.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
        };
        shape(0, 16, 64), shape(1, 16, 64);        // scores of 16 keys
        shape(2, 16, 64);                          // 32 numbers of 16 keys, or 16 columns of 32 values
        shape(3, 16, 64);                          // 32 numbers of the queries
        shape(4, group, 64), shape(5, group, 64);  // 16 columns of the weighted values
        shape(6, group, 64), shape(7, group, 64);  // weights of 32 keys
        // The intrinsics do not tell GCC that memory is read: without this, it may drop what was stored.
        asm volatile("" ::"r"(q_pairs_.data()), "r"(&shapes) : "memory");
        _tile_loadconfig(&shapes);
    }
    ~GroupTiles() { _tile_release(); }

    void score(const bf16* k_SH, float scale, float* scores_GS, Ahead& ahead) const {
        alignas(64) float sums_SG[kBlock][kHeads], sums_GS[kHeads][kBlock];
        for (int64_t start = 0; start < kBlock; start += 32) {
            const bf16* k = k_SH + start * width_;
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t h = 0; h < width_; h += 32) {
                ahead.ask(16);
                _tile_loadd(3, q_pairs_.data() + h / 2 * kHeads, 64);
                _tile_loadd(2, k + h, 2 * width_);
                _tile_dpbf16ps(0, 2, 3);
                _tile_loadd(2, k + 16 * width_ + h, 2 * width_);
                _tile_dpbf16ps(1, 2, 3);
            }
            _tile_stored(0, sums_SG[start], 64);
            _tile_stored(1, sums_SG[start + 16], 64);
        }
        transpose_words(sums_SG, sums_GS, kBlock, kHeads);
        for (int64_t g = 0; g < group_; ++g)
            for (int64_t s = 0; s < kBlock; s += 16) store(scores_GS + g * kBlock + s, load(sums_GS[g] + s) * scale);
    }

    // sums = factor * sums + weights * values
    void add_values(const bf16* v_SE, const float* weights_GS, const float* factors_G, float* sums_GE, Ahead& ahead) const {
        bf16 weights[kHeads * kBlock];
        for (int64_t i = 0; i < group_ * kBlock; i += 16) store(weights + i, load(weights_GS + i));
        asm volatile("" ::"r"(weights) : "memory");
        _tile_loadd(6, weights, 2 * kBlock);
        _tile_loadd(7, weights + 32, 2 * kBlock);
        alignas(64) bf16 pairs[2][2][kBlock / 2][32];
        alignas(64) float added[2][kHeads][16];
        const int32x16 kFirst = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
        auto interleave = [&](int64_t e, auto& pairs) {
            for (int64_t s = 0; s < kBlock; s += 2) {
                const bf16* v = v_SE + s * value_width_ + e;
                ahead.ask(2);
                const __m512i even = _mm512_loadu_si512(v), odd = _mm512_loadu_si512(v + value_width_);
                // Within each quarter of a vector: columns 0 to 3 of every 8 to the one, 4 to 7 to the other.
                _mm512_store_si512(pairs[0][s / 2], _mm512_unpacklo_epi16(even, odd));
                _mm512_store_si512(pairs[1][s / 2], _mm512_unpackhi_epi16(even, odd));
            }
            asm volatile("" ::"r"(pairs) : "memory");
        };
        interleave(0, pairs[0]);
        for (int64_t e = 0; e < value_width_; e += 32) {
            const auto& now = pairs[e / 32 % 2];
            // The next ones meanwhile: a tile is loaded late from memory that has just been written.
            if (e + 32 < value_width_) interleave(e + 32, pairs[(e / 32 + 1) % 2]);
            _tile_zero(4);
            _tile_zero(5);
            _tile_loadd(2, now[0][0], 64);
            _tile_dpbf16ps(4, 6, 2);
            _tile_loadd(2, now[1][0], 64);
            _tile_dpbf16ps(5, 6, 2);
            _tile_loadd(2, now[0][16], 64);
            _tile_dpbf16ps(4, 7, 2);
            _tile_loadd(2, now[1][16], 64);
            _tile_dpbf16ps(5, 7, 2);
            _tile_stored(4, added[0], 64);
            _tile_stored(5, added[1], 64);
            for (int64_t g = 0; g < group_; ++g) {
                float* sums = sums_GE + g * value_width_ + e;
                const float16 low = load(added[0][g]), high = load(added[1][g]);
                store(sums, load(sums) * factors_G[g] + __builtin_shuffle(low, high, kFirst));
                store(sums + 16, load(sums + 16) * factors_G[g] + __builtin_shuffle(low, high, kFirst + 8));
            }
        }
    }

  private:
    int64_t group_, width_, value_width_;
    std::vector<uint32_t> q_pairs_;
};
#endif

// What one chunk of keys gives: for each query head of the group the largest score, the sum of weights and of weighted
// values, both relative to that score.
template <class X>
struct Attention {
    const X *q, *k, *v, *mask;
    X* out;
    int64_t n_rows, n_heads, n_kv_heads, max_keys, width, value_width, mask_stride;

    struct Item {
        int64_t head, start, stop;  // a key/value head of a row, and some of the keys
    };

    int64_t group() const { return n_heads / n_kv_heads; }
    int64_t n_result() const { return group() * (2 + value_width); }

    // Keys before the first visible one and after the last are not read.
    std::pair<int64_t, int64_t> visible_keys(int64_t row) const {
        const X* mask_S = mask + row * mask_stride;
        int64_t start = 0, stop = max_keys;
        while (stop > 0 && to_float(mask_S[stop - 1]) == -INFINITY) --stop;
        while (start < stop && to_float(mask_S[start]) == -INFINITY) ++start;
        return {start, stop};
    }

    std::vector<Item> items() const {
        std::vector<Item> items;
        for (int64_t row = 0; row < n_rows; ++row) {
            const auto [start, stop] = visible_keys(row);
            for (int64_t head = row * n_kv_heads; head < (row + 1) * n_kv_heads; ++head)
                for (int64_t s = start; s == start || s < stop; s += kChunk) items.push_back({head, s, std::min(s + kChunk, stop)});
        }
        return items;
    }

    // All query heads of the group at once: every key and value is read one time.
    void run(const Item& item, float* result) const {
        const X* q_GH = q + item.head * group() * width;
        const X* k_SH = k + item.head * max_keys * width;
        const X* v_SE = v + item.head * max_keys * value_width;
        const X* mask_S = mask + item.head / n_kv_heads * mask_stride;
        float *tops_G = result, *totals_G = result + group(), *sums_GE = totals_G + group();
        std::fill_n(tops_G, group(), -INFINITY), std::fill_n(totals_G, group() * (1 + value_width), 0.f);
        thread_local std::vector<float> weights, factors;
        weights.resize(group() * kBlock), factors.resize(group());
        std::optional<GroupTiles<X>> tiles;
        if (GroupTiles<X>::take(group(), width, value_width)) tiles.emplace(q_GH, group(), width, value_width);
        for (int64_t start = item.start; start < item.stop; start += kBlock) {
            const int64_t n = std::min(kBlock, item.stop - start);
            float added[kBlock];
            int32_t seen[kBlock], n_seen = 0;
            for (int64_t s = 0; s < kBlock; ++s) added[s] = s < n ? to_float(mask_S[start + s]) : -INFINITY;
            for (int64_t s = 0; s < n; ++s) seen[n_seen] = static_cast<int32_t>(s), n_seen += added[s] != -INFINITY;
            if (n_seen == 0) continue;
            const X *k = k_SH + start * width, *v = v_SE + start * value_width, *next_k = k + kBlock * width;
            const bool is_tiled = tiles && n_seen == kBlock;  // what is not seen may be NaN, which no weight of 0 removes
            Ahead ahead(next_k, kBlock * width * sizeof(X), v + kBlock * value_width, kBlock * value_width * sizeof(X));
            if (is_tiled) tiles->score(k, scale(), weights.data(), ahead);
            else score(q_GH, k, v, n, weights.data());
            for (int64_t g = 0; g < group(); ++g) {
                if (is_tiled) ahead.ask(96 / group());
                factors[g] = weigh(added, weights.data() + g * kBlock, tops_G[g], totals_G[g]);
            }
            if (is_tiled) {
                tiles->add_values(v, weights.data(), factors.data(), sums_GE, ahead);
                continue;
            }
            int64_t g = 0;
            auto add = [&]<int C>() {
                add_values<C>(v, next_k, seen, n_seen, weights.data() + g * kBlock, factors.data() + g, sums_GE + g * value_width);
                g += C;
            };
            while (g + 4 <= group()) add.template operator()<4>();
            if (g + 2 <= group()) add.template operator()<2>();
            if (g < group()) add.template operator()<1>();
        }
    }

    float scale() const { return 1 / std::sqrt(static_cast<float>(width)); }

    // Asks for the values meanwhile, and while these are added up for the next keys: memory is never idle.
    void score(const X* q_GH, const X* k_SH, const X* v_SE, int64_t n, float* scores) const {
        auto dots = [&]<int R, int C>(int64_t s, int64_t g) {
            float out[R][C];
            dot_rows<R, C, false>(k_SH + s * width, q_GH + g * width, width, out);
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < C; ++c) scores[(g + c) * kBlock + s + r] = out[r][c] * scale();
        };
        auto rows = [&]<int R>(int64_t s) {
            const char* values = reinterpret_cast<const char*>(v_SE + s * value_width);
            for (int64_t offset = 0; offset < R * value_width * static_cast<int64_t>(sizeof(X)); offset += kLine)
                __builtin_prefetch(values + offset);
            int64_t g = 0;
            for (; g + 4 <= group(); g += 4) dots.template operator()<R, 4>(s, g);
            for (; g + 2 <= group(); g += 2) dots.template operator()<R, 2>(s, g);
            if (g < group()) dots.template operator()<R, 1>(s, g);
        };
        int64_t s = 0;
        for (; s + 4 <= n; s += 4) rows.template operator()<4>(s);
        for (; s < n; ++s) rows.template operator()<1>(s);
    }

    // Scores of a block to weights; returns what the sums so far are to be multiplied with.
    static float weigh(const float* added, float* weights, float& top, float& total) {
        float16 values[kBlock / 16], tops = spread(top);
        for (int64_t i = 0; i < kBlock / 16; ++i) {
            const float16 mask = load(added + 16 * i);
            values[i] = mask == -INFINITY ? mask : load(weights + 16 * i) + mask;
            tops = larger(values[i], tops);
        }
        float new_top = top;
        for (int lane = 0; lane < 16; ++lane) new_top = std::max(new_top, tops[lane]);
        const float factor = top == new_top ? 1.f : top == -INFINITY ? 0.f : std::exp(top - new_top);
        float16 sums = {};
        for (int64_t i = 0; i < kBlock / 16; ++i) {
            values[i] = exp2_of<7>((values[i] - new_top) * kLog2E);
            store(weights + 16 * i, values[i]);
            sums += values[i];
        }
        top = new_top;
        total = total * factor + sum(sums);
        return factor;
    }

    template <int C>
    void add_values(
        const X* v_SE, const X* next_k, const int32_t* seen, int32_t n_seen, const float* weights, const float* factors,
        float* sums_GE) const {
        auto columns = [&]<int V>(int64_t e) {
            float16 sums[C][V];
            for (int c = 0; c < C; ++c)
                for (int i = 0; i < V; ++i) sums[c][i] = load(sums_GE + c * value_width + e + 16 * i) * factors[c];
            for (int32_t index = 0; index < n_seen; ++index) {
                const int64_t s = seen[index];
                const char* ahead = reinterpret_cast<const char*>(next_k + s * width + e);
                for (int64_t offset = 0; offset < 16 * V * static_cast<int64_t>(sizeof(X)); offset += kLine)
                    __builtin_prefetch(ahead + offset);
                for (int i = 0; i < V; ++i) {
                    const float16 values = load(v_SE + s * value_width + e + 16 * i);
                    for (int c = 0; c < C; ++c) sums[c][i] += weights[c * kBlock + s] * values;
                }
            }
            for (int c = 0; c < C; ++c)
                for (int i = 0; i < V; ++i) store(sums_GE + c * value_width + e + 16 * i, sums[c][i]);
        };
        int64_t e = 0;
        for (; e + 64 <= value_width; e += 64) columns.template operator()<4>(e);
        for (; e + 16 <= value_width; e += 16) columns.template operator()<1>(e);
        for (; e < value_width; ++e)
            for (int c = 0; c < C; ++c) {
                float total = sums_GE[c * value_width + e] * factors[c];
                for (int32_t index = 0; index < n_seen; ++index)
                    total += weights[c * kBlock + seen[index]] * to_float(v_SE[seen[index] * value_width + e]);
                sums_GE[c * value_width + e] = total;
            }
    }

    // The chunks of one key/value head together; results lie one behind the other.
    void finish(int64_t head, const float* results, int64_t n_chunks) const {
        for (int64_t g = 0; g < group(); ++g) {
            float top = -INFINITY, total = 0;
            for (int64_t c = 0; c < n_chunks; ++c) top = std::max(top, results[c * n_result() + g]);
            thread_local std::vector<float> sums;
            sums.assign(value_width, 0.f);
            for (int64_t c = 0; c < n_chunks; ++c) {
                const float* result = results + c * n_result();
                const float factor = result[g] == -INFINITY ? 0.f : std::exp(result[g] - top);
                // A chunk that holds a NaN may have no largest score.
                if (result[g] == -INFINITY && result[group() + g] == 0.f) continue;
                total += result[group() + g] * factor;
                const float* sums_E = result + 2 * group() + g * value_width;
                for (int64_t e = 0; e < value_width; ++e) sums[e] += sums_E[e] * factor;
            }
            X* out_E = out + (head * group() + g) * value_width;
            for (int64_t e = 0; e < value_width; ++e) out_E[e] = from_float<X>(total == 0.f ? 0.f : sums[e] / total);
        }
    }
};

template <class X>
void attend(const View& q, const View& k, const View& v, const View& mask, void* out) {
    const Attention<X> attention{
        static_cast<const X*>(q.data),
        static_cast<const X*>(k.data),
        static_cast<const X*>(v.data),
        static_cast<const X*>(mask.data),
        static_cast<X*>(out),
        q.sizes[0],
        q.sizes[1],
        k.sizes[1],
        k.sizes[2],
        q.sizes[3],
        v.sizes[3],
        mask.sizes[0] == 1 ? 0 : k.sizes[2]};
    const auto items = attention.items();
    const int64_t n_items = static_cast<int64_t>(items.size()), n_result = attention.n_result();
    thread_local std::vector<float> memory;
    memory.resize(n_items * n_result);
    float* results = memory.data();
    team().run(n_parts(n_items), [&](int index, int n) {
        const auto [start, stop] = part(n_items, index, n);
        for (int64_t item = start; item < stop; ++item) attention.run(items[item], results + item * n_result);
    });
    for (int64_t start = 0, stop; start < n_items; start = stop) {
        for (stop = start; stop < n_items && items[stop].head == items[start].head;) ++stop;
        attention.finish(items[start].head, results + start * n_result, stop - start);
    }
}

AtenTensorHandle attention(
    AtenTensorHandle q_BN1H, AtenTensorHandle k_BKSH, AtenTensorHandle v_BKSH, AtenTensorHandle mask_B11S) {
    const View q(q_BN1H), k(k_BKSH), v(v_BKSH), mask(mask_B11S);
    check(q.n_dims == 4 && k.n_dims == 4 && v.n_dims == 4 && mask.n_dims == 4, "q, k, v and mask must have 4 dimensions");
    check(q.sizes[2] == 1 && mask.sizes[1] == 1 && mask.sizes[2] == 1, "there must be one query token");
    check(std::equal(k.sizes, k.sizes + 3, v.sizes) && k.sizes[0] == q.sizes[0] && k.sizes[3] == q.sizes[3] &&
              k.sizes[1] > 0 && q.sizes[1] % k.sizes[1] == 0 && mask.sizes[3] == k.sizes[2] && (mask.sizes[0] == 1 || mask.sizes[0] == q.sizes[0]),
          "the shapes of q, k, v and mask must fit together");
    check(k.dtype == q.dtype && v.dtype == q.dtype && mask.dtype == q.dtype, "q, k, v and mask must have one dtype");
    const auto [out, data] = empty({q.sizes[0], q.sizes[1], 1, v.sizes[3]}, q.dtype);
    if (q.dtype == kBFloat16) attend<bf16>(q, k, v, mask, data);
    else attend<float>(q, k, v, mask, data);
    return out;
}

Tensor boxed_linear(Tensor x, std::vector<Tensor> matrices) {
    std::vector<AtenTensorHandle> handles;
    for (const Tensor& matrix : matrices) handles.push_back(matrix.get());
    return Tensor(linear(x.get(), handles.data(), static_cast<int64_t>(handles.size())));
}

Tensor boxed_attention(Tensor q, Tensor k, Tensor v, Tensor mask) {
    return Tensor(attention(q.get(), k.get(), v.get(), mask.get()));
}

template <class Function>
AOTITorchError guarded(const Function& function) {
    try {
        function();
    } catch (const std::exception& error) {
        std::fprintf(stderr, "hydra decode kernel: %s\n", error.what());
        return AOTI_TORCH_FAILURE;
    }
    return AOTI_TORCH_SUCCESS;
}

}  // namespace

// What a compiled graph calls directly: going through the dispatcher takes longer than a small product.
extern "C" __attribute__((visibility("default"))) AOTITorchError aoti_torch_cpu_decode_linear(
    AtenTensorHandle x, const AtenTensorHandle* matrices, int64_t n_matrices, AtenTensorHandle* out) {
    return guarded([&] { *out = linear(x, matrices, n_matrices); });
}

extern "C" __attribute__((visibility("default"))) AOTITorchError aoti_torch_cpu_decode_attention(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle mask, AtenTensorHandle* out) {
    return guarded([&] { *out = attention(q, k, v, mask); });
}

STABLE_TORCH_LIBRARY(hydra, library) {
    library.def("decode_linear(Tensor x, Tensor[] matrices) -> Tensor");
    library.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor mask) -> Tensor");
    library.def("decode_set_threads(int n_threads) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(hydra, CPU, library) {
    library.impl("decode_linear", TORCH_BOX(&boxed_linear));
    library.impl("decode_attention", TORCH_BOX(&boxed_attention));
}
STABLE_TORCH_LIBRARY_IMPL(hydra, CompositeExplicitAutograd, library) {
    library.impl("decode_set_threads", TORCH_BOX(&set_threads));
}
