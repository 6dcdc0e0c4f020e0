// The int4 product with AVX2: u4 x s8 by maddubs. A pair is at most 2 x 15 x 127 = 3810, two fit 16 bits easily.
#include <immintrin.h>

#include "job.h"

namespace {

constexpr int kTileRows = 1;
constexpr int kTileBatch = 4;

struct Codes {
    __m256i low[2], high[2];
};
struct Sums {
    __m256i half[2];
};
struct Scales {
    __m256 half[2];
};
using Total = __m256;

inline Codes load(const uint8_t* p) {
    const __m256i mask = _mm256_set1_epi8(15);
    Codes codes;
    for (int h = 0; h < 2; ++h) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + h);
        codes.low[h] = _mm256_and_si256(pairs, mask);
        codes.high[h] = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), mask);
    }
    return codes;
}

inline Codes load_tail(const uint8_t* p, int64_t bytes) {
    alignas(32) uint8_t padded[64] = {};
    __builtin_memcpy(padded, p, bytes);
    return load(padded);
}

inline Sums dot(const Codes& codes, const int8_t* x) {
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i* even = reinterpret_cast<const __m256i*>(x);
    Sums sums;
    for (int h = 0; h < 2; ++h) {
        const __m256i low = _mm256_maddubs_epi16(codes.low[h], _mm256_loadu_si256(even + h));
        const __m256i high = _mm256_maddubs_epi16(codes.high[h], _mm256_loadu_si256(even + 2 + h));
        sums.half[h] = _mm256_madd_epi16(_mm256_add_epi16(low, high), ones);
    }
    return sums;
}

template <int G>
inline Scales spread(const float* scale) {
    Scales scales;
    for (int h = 0; h < 2; ++h)
        scales.half[h] = G == 32 ? _mm256_set_m128(_mm_set1_ps(scale[2 * h + 1]), _mm_set1_ps(scale[2 * h]))
                                 : _mm256_set1_ps(scale[G == 64 ? h : 0]);
    return scales;
}

inline Total add(Total total, const Sums& sums, const Scales& scales, float step_scale) {
    const __m256 step = _mm256_set1_ps(step_scale);
    for (int h = 0; h < 2; ++h)
        total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.half[h]), _mm256_mul_ps(scales.half[h], step), total);
    return total;
}

inline float sum(Total total) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

#include "rows.h"

}  // namespace

namespace int4 {
extern const Kernels avx2_kernels = {quantize, fast, exact, dequantize, read};
}
