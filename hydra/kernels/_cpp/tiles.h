// Products of tiles of matrices, and the forms that their factors must have.
//
// C (M, N) = A (M, L) B (L, N), where A and C lie in rows. B lies in rows too if its numbers are float32; bfloat16
// processors want pairs: rows l and l + 1 lie interleaved, so that two factors of one sum are neighbours.

#pragma once

#include "common.h"

namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {  // of libtorch_cpu: oneDNN's kernels for AMX
void brgemm(
    int64_t m, int64_t n, int64_t l, int64_t row_a, int64_t row_b, int64_t row_c, bool adds, const c10::BFloat16* a,
    const c10::BFloat16* b, float* c, bool is_in_pairs);
void brgemm_release(bool is_in_pairs);
}  // namespace at::native::cpublas

namespace {

template <class Y>
constexpr int64_t kPair = 4 / sizeof(Y);  // numbers of a word

// ----------------------------------------------------------------------------------------------------------- products

#if defined(__AVX512F__)
constexpr int kBlockRows = 8, kBlockVectors = 2;
#else
constexpr int kBlockRows = 4, kBlockVectors = 1;
#endif

inline float16 add_products(float16 sums, const float* a, const float* b) { return sums + *a * load(b); }
#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
inline float16 add_products(float16 sums, const bf16* a, const bf16* b) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return std::bit_cast<float16>(_mm512_dpbf16_ps(
        std::bit_cast<__m512>(sums), (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(b)));
}
#else
constexpr bool kHasPairs = false;
inline float16 add_products(float16 sums, const bf16*, const bf16*) { return sums; }
#endif

template <int R, int C, class Y>
inline void multiply_block(int64_t n_l, const Y* a, const Y* b, int64_t row_b, float* c, bool adds) {
    float16 sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < C; ++v) sums[r][v] = adds ? load(c + r * row_b + 16 * v) : float16{};
    for (int64_t l = 0; l < n_l; l += kPair<Y>)
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < C; ++v)
                sums[r][v] = add_products(sums[r][v], a + r * n_l + l, b + l * row_b + 16 * kPair<Y> * v);
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < C; ++v) store(c + r * row_b + 16 * v, sums[r][v]);
}

// C = A B, or C += A B; all three contiguous, M a multiple of 8 and N of 32.
template <class Y>
inline void multiply(int64_t m, int64_t n, int64_t l, const Y* a, const Y* b, float* c, bool adds, bool has_amx) {
    if constexpr (sizeof(Y) == 2) {
        if (has_amx) {
            at::native::cpublas::brgemm(
                m, n, l, l, n, n, adds, reinterpret_cast<const c10::BFloat16*>(a),
                reinterpret_cast<const c10::BFloat16*>(b), c, true);
            return;
        }
    }
    for (int64_t column = 0; column < n; column += 16 * kBlockVectors)
        for (int64_t row = 0; row < m; row += kBlockRows)
            multiply_block<kBlockRows, kBlockVectors>(
                l, a + row * l, b + kPair<Y> * column, n, c + row * n + column, adds);
}

// -------------------------------------------------------------------------------------------------------------- forms

// Lane i ^ D of the other vector wherever bit D of the lane differs from `upper`: one step of a transposition.
template <int D>
inline void exchange(uint32x16& a, uint32x16& b) {
    int32x16 first, second;
    for (int lane = 0; lane < 16; ++lane) {
        first[lane] = (lane & D) == 0 ? lane : 16 + lane - D;
        second[lane] = (lane & D) == 0 ? lane + D : 16 + lane;
    }
    const uint32x16 new_a = __builtin_shuffle(a, b, std::bit_cast<uint32x16>(first));
    b = __builtin_shuffle(a, b, std::bit_cast<uint32x16>(second));
    a = new_a;
}

template <int D>
inline void exchange_all(uint32x16 (&rows)[16]) {
    for (int i = 0; i < 16; ++i)
        if ((i & D) == 0) exchange<D>(rows[i], rows[i + D]);
}

// Words (R, C) to words (C, R); both multiples of 16.
inline void transpose_words(const void* from, void* to, int64_t n_rows, int64_t n_columns) {
    const uint32_t* source = static_cast<const uint32_t*>(from);
    uint32_t* target = static_cast<uint32_t*>(to);
    for (int64_t row = 0; row < n_rows; row += 16)
        for (int64_t column = 0; column < n_columns; column += 16) {
            uint32x16 block[16];
            for (int i = 0; i < 16; ++i) std::memcpy(&block[i], source + (row + i) * n_columns + column, 64);
            exchange_all<8>(block), exchange_all<4>(block), exchange_all<2>(block), exchange_all<1>(block);
            for (int i = 0; i < 16; ++i) std::memcpy(target + (column + i) * n_rows + row, &block[i], 64);
        }
}

// Rows to pairs: two rows (W) to one of words (W). 16 numbers of each.
inline void store_pairs(float* to, float16 first) { store(to, first); }
inline void store_pairs(bf16* to, float16 first, float16 second) {
#if defined(__AVX512BF16__)
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both =
        (__m512i)_mm512_cvtne2ps_pbh(std::bit_cast<__m512>(second), std::bit_cast<__m512>(first));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
#else
    const uint32x16 words = round_to_bf16(first) >> 16 | (round_to_bf16(second) & 0xffff0000u);
    std::memcpy(to, &words, sizeof words);
#endif
}

// (rows, W) of the caller's to (n_rows, width) contiguous, with zeros where there is nothing.
template <class X, class Y>
inline void copy_rows(const X* from, int64_t stride, int64_t rows, int64_t w, Y* to, int64_t n_rows, int64_t width) {
    for (int64_t row = 0; row < n_rows; ++row) {
        int64_t i = 0;
        if (row < rows) {
            for (; i + 16 <= w; i += 16) store(to + row * width + i, load(from + row * stride + i));
            for (; i < w; ++i) to[row * width + i] = from_float<Y>(to_float(from[row * stride + i]));
        }
        std::memset(static_cast<void*>(to + row * width + i), 0, (width - i) * sizeof(Y));
    }
}

// Rows (R, W) to the form of a second factor of R inner rows.
template <class Y>
inline void make_pairs(const Y* from, Y* to, int64_t n_rows, int64_t width) {
    if constexpr (sizeof(Y) == 4) {
        std::memcpy(to, from, n_rows * width * sizeof(Y));
    } else {
        for (int64_t row = 0; row < n_rows; row += 2)
            for (int64_t i = 0; i < width; i += 16)
                store_pairs(to + row * width + 2 * i, load(from + row * width + i), load(from + (row + 1) * width + i));
    }
}

}  // namespace
