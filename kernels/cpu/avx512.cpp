// The int4 product with AVX512-VNNI: 128 codes in two vpdpbusd.
#include <immintrin.h>

#include "job.h"

namespace {

constexpr int kTileRows = 2;
constexpr int kTileBatch = 8;

struct Codes {
    __m512i low, high;
};
using Sums = __m512i;
using Scales = __m512;
using Total = __m512;

inline Codes split(__m512i pairs) {
    const __m512i mask = _mm512_set1_epi8(15);
    return {_mm512_and_si512(pairs, mask), _mm512_and_si512(_mm512_srli_epi16(pairs, 4), mask)};
}

inline Codes load(const uint8_t* p) { return split(_mm512_loadu_si512(p)); }

inline Codes load_tail(const uint8_t* p, int64_t bytes) {
    return split(_mm512_maskz_loadu_epi8((1ull << bytes) - 1, p));
}

inline Sums dot(const Codes& codes, const int8_t* x) {
    const Sums even = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes.low, _mm512_loadu_si512(x));
    return _mm512_dpbusd_epi32(even, codes.high, _mm512_loadu_si512(x + 64));
}

template <int G>
inline Scales spread(const float* scale) {
    if (G == 32) {
        const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(scale)));
    }
    if (G == 64) return _mm512_mask_broadcastss_ps(_mm512_set1_ps(scale[0]), 0xff00, _mm_load_ss(scale + 1));
    return _mm512_set1_ps(scale[0]);
}

inline Total add(Total total, Sums sums, Scales scales, float step_scale) {
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scales);
    return _mm512_fmadd_ps(scaled, _mm512_set1_ps(step_scale), total);
}

inline float sum(Total total) { return _mm512_reduce_add_ps(total); }

#include "rows.h"

}  // namespace

namespace int4 {
extern const Kernels avx512_kernels = {quantize, fast, exact, dequantize, read};
}
