// What the kernels share: the caller's tensors, and numbers 16 at a time.

#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace {

// ------------------------------------------------------------------------------------------------------------ tensors

void check(bool holds, const char* what) {
    if (!holds) throw std::runtime_error(what);
}

const int32_t kFloat32 = aoti_torch_dtype_float32(), kBFloat16 = aoti_torch_dtype_bfloat16(), kUint8 = aoti_torch_dtype_uint8();

// What is to be known of a tensor that belongs to the caller, in any layout.
struct StridedView {
    void* data = nullptr;
    int64_t *sizes = nullptr, *strides = nullptr;
    int64_t n_dims = 0;
    int32_t dtype = 0;

    explicit StridedView(AtenTensorHandle tensor) {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &data));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &n_dims));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
    }
};

struct View : StridedView {
    explicit View(AtenTensorHandle tensor) : StridedView(tensor) {
        bool is_contiguous = false;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor, &is_contiguous));
        check(is_contiguous, "tensors must be contiguous");
    }

    int64_t numel() const {
        int64_t n = 1;
        for (int64_t d = 0; d < n_dims; ++d) n *= sizes[d];
        return n;
    }
};

// A tensor of the caller's, and where its numbers are.
std::pair<AtenTensorHandle, void*> empty(const std::vector<int64_t>& shape, int32_t dtype) {
    check(dtype == kFloat32 || dtype == kBFloat16, "activations must be float32 or bfloat16");
    std::vector<int64_t> strides(shape.size());
    int64_t stride = 1;
    for (size_t d = shape.size(); d-- > 0; stride *= shape[d]) strides[d] = stride;
    AtenTensorHandle tensor = nullptr;
    void* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &tensor));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &data));
    return {tensor, data};
}

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
typedef int32_t int32x16 __attribute__((vector_size(64)));
typedef uint16_t uint16x16 __attribute__((vector_size(32)));

float16 load(const float* from) {
    float16 values;
    std::memcpy(&values, from, sizeof values);
    return values;
}
float16 load(const bf16* from) {
#if defined(__AVX512F__)  // of which GCC makes four instructions more
    return std::bit_cast<float16>(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
#else
    uint16x16 bits;
    std::memcpy(&bits, from, sizeof bits);
    return std::bit_cast<float16>(__builtin_convertvector(bits, uint32x16) << 16);
#endif
}
void store(float* to, float16 values) { std::memcpy(to, &values, sizeof values); }
uint32x16 round_to_bf16(float16 values) {  // in the upper halves, whose lower ones are left over; to nearest, ties to even
    const uint32x16 bits = std::bit_cast<uint32x16>(values);
    const int32x16 is_nan = values != values;
    return is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
}
void store(bf16* to, float16 values) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh(std::bit_cast<__m512>(values));
    std::memcpy(to, &rounded, sizeof rounded);
#else
    const uint16x16 rounded = __builtin_convertvector(round_to_bf16(values) >> 16, uint16x16);
    std::memcpy(to, &rounded, sizeof rounded);
#endif
}
float sum(float16 values) {
    float total = 0;
    for (int lane = 0; lane < 16; ++lane) total += values[lane];
    return total;
}
float16 spread(float value) { return float16{} + value; }
float16 larger(float16 a, float16 b) { return a > b ? a : b; }

constexpr float kLog2E = 1.44269504f;

// 2^x to about TERMS - 1 digits for x <= 1; 0 below 2^-126.
template <int TERMS>
float16 exp2_of(float16 x) {
    const int32x16 is_tiny = x < -126.f;
    x = is_tiny ? spread(-126.f) : x;
    const int32x16 whole = __builtin_convertvector(x - 0.5f, int32x16);
    const float16 f = x - __builtin_convertvector(whole, float16);
    // The Taylor series of exp(f ln 2); f is at most a half.
    constexpr float kSeries[7] = {1.f, .69314718f, .24022651f, .055504109f, .0096181291f, .0013333558f, .00015403530f};
    float16 value = spread(kSeries[TERMS - 1]);
    for (int term = TERMS - 2; term >= 0; --term) value = value * f + kSeries[term];
    value *= std::bit_cast<float16>((whole + 127) << 23);
    return is_tiny ? spread(0.f) : value;
}

}  // namespace
