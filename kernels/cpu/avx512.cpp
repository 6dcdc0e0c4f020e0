// The product with AVX512-VNNI: 128 codes in two vpdpbusd.
#include <immintrin.h>

#include "attention.h"
#include "decoder.h"

namespace {

// (Measured, Zen 4, 8 activations and more: 4 x 4 takes 0.55 to 0.9 of the time of 2 x 8, 3 x 4 and 4 x 3 0.5 to 1.1 of it.
// Eight wide activations with their scales do not fit the first cache.)
constexpr int kTileRows = 4;
constexpr int kTileBatch = 4;

struct Codes {
    __m512i even, odd;
};
using Sums = __m512i;
using Scales = __m512;
using Total = __m512;

inline Codes split(__m512i pairs) {
    const __m512i mask = _mm512_set1_epi8(15);
    return {_mm512_and_si512(pairs, mask), _mm512_and_si512(_mm512_srli_epi16(pairs, 4), mask)};
}

// 128 codes of 8 bits, the even and the odd runs of four.
inline Codes split(__m512i first, __m512i second) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return {_mm512_permutex2var_epi32(first, even, second), _mm512_permutex2var_epi32(first, odd, second)};
}

template <int B>
inline Codes load(const uint8_t* p) {
    if constexpr (B == 4)
        return split(_mm512_loadu_si512(p));
    else
        return split(_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64));
}

template <int B>
inline Codes load_tail(const uint8_t* p, int64_t bytes) {
    if constexpr (B == 4) {
        return split(_mm512_maskz_loadu_epi8((1ull << bytes) - 1, p));
    } else {
        const __mmask64 first = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
        const __mmask64 second = bytes > 64 ? (1ull << (bytes - 64)) - 1 : 0;
        return split(_mm512_maskz_loadu_epi8(first, p), _mm512_maskz_loadu_epi8(second, p + 64));
    }
}

inline Sums dot(const Codes& codes, const int8_t* x, const int32_t* centre) {
    const Sums even = _mm512_dpbusd_epi32(_mm512_loadu_si512(centre), codes.even, _mm512_loadu_si512(x));
    return _mm512_dpbusd_epi32(even, codes.odd, _mm512_loadu_si512(x + 64));
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

inline Scales load_scales(const float* scale) { return _mm512_loadu_ps(scale); }

inline Total add(Total total, Sums sums, Scales scales, Scales x_scales) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(scales, x_scales), total);
}

inline float sum(Total total) { return _mm512_reduce_add_ps(total); }

#include "rows.h"

#include "lanes.h"

#include "attention_lanes.h"

#include "attention_vnni.h"

}  // namespace

namespace int4 {
extern const Kernels avx512_kernels = {quantize, fast, exact, dequantize, read};
extern const DecoderKernels avx512_decoder = {widen, narrow, normalize, gate, attend};
extern const AttentionKernels avx512_attention = {quantize_row, prepare_query, attend_piece<VnniLanes>};
}
