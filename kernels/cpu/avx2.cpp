// The product with AVX2: u4 x s8 by maddubs. A pair is at most 2 x 15 x 127 = 3810, two fit 16 bits easily. A pair of
// 8-bit codes would not, so their nibbles are multiplied apart.
#include <immintrin.h>

#include "attention.h"
#include "decoder.h"

namespace {

constexpr int kTileRows = 1;
constexpr int kTileBatch = 4;

struct Nibbles {
    __m256i even[2], odd[2];
};
struct Bytes {
    Nibbles low, high;
};
struct Sums {
    __m256i half[2];
};
struct Scales {
    __m256 half[2];
};
using Total = __m256;

inline __m256i low_nibbles(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }

inline __m256i high_nibbles(__m256i bytes) { return low_nibbles(_mm256_srli_epi16(bytes, 4)); }

template <int B>
inline auto load(const uint8_t* p) {
    const __m256i* vectors = reinterpret_cast<const __m256i*>(p);
    if constexpr (B == 4) {
        Nibbles codes;
        for (int h = 0; h < 2; ++h) {
            const __m256i pairs = _mm256_loadu_si256(vectors + h);
            codes.even[h] = low_nibbles(pairs);
            codes.odd[h] = high_nibbles(pairs);
        }
        return codes;
    } else {
        const __m256i runs = _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0);
        Bytes codes;
        for (int h = 0; h < 2; ++h) {
            const __m256i first = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(vectors + 2 * h), runs);
            const __m256i second = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(vectors + 2 * h + 1), runs);
            const __m256i even = _mm256_permute2x128_si256(first, second, 0x20);
            const __m256i odd = _mm256_permute2x128_si256(first, second, 0x31);
            codes.low.even[h] = low_nibbles(even);
            codes.low.odd[h] = low_nibbles(odd);
            codes.high.even[h] = high_nibbles(even);
            codes.high.odd[h] = high_nibbles(odd);
        }
        return codes;
    }
}

template <int B>
inline auto load_tail(const uint8_t* p, int64_t bytes) {
    alignas(32) uint8_t padded[int4::kStepBytes<B>] = {};
    __builtin_memcpy(padded, p, bytes);
    return load<B>(padded);
}

inline Sums load_sums(const int32_t* sums) {
    const __m256i* vectors = reinterpret_cast<const __m256i*>(sums);
    return {{_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)}};
}

inline Sums dot(const Nibbles& codes, const int8_t* x, Sums sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i* values = reinterpret_cast<const __m256i*>(x);
    for (int h = 0; h < 2; ++h) {
        const __m256i even = _mm256_maddubs_epi16(codes.even[h], _mm256_loadu_si256(values + h));
        const __m256i odd = _mm256_maddubs_epi16(codes.odd[h], _mm256_loadu_si256(values + 2 + h));
        sums.half[h] = _mm256_add_epi32(sums.half[h], _mm256_madd_epi16(_mm256_add_epi16(even, odd), ones));
    }
    return sums;
}

inline Sums dot(const Nibbles& codes, const int8_t* x, const int32_t* centre) { return dot(codes, x, load_sums(centre)); }

inline Sums dot(const Bytes& codes, const int8_t* x, const int32_t* centre) {
    const Sums low = dot(codes.low, x, centre), high = dot(codes.high, x, Sums{});
    Sums sums;
    for (int h = 0; h < 2; ++h) sums.half[h] = _mm256_add_epi32(low.half[h], _mm256_slli_epi32(high.half[h], 4));
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

inline Scales load_scales(const float* scale) { return {{_mm256_loadu_ps(scale), _mm256_loadu_ps(scale + 8)}}; }

inline Total add(Total total, const Sums& sums, const Scales& scales, const Scales& x_scales) {
    for (int h = 0; h < 2; ++h)
        total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.half[h]), _mm256_mul_ps(scales.half[h], x_scales.half[h]), total);
    return total;
}

inline float sum(Total total) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

#include "rows.h"

#include "lanes.h"

#include "attention_lanes.h"

#include "attention_avx2.h"

}  // namespace

namespace int4 {
extern const Kernels avx2_kernels = {quantize, fast, exact, dequantize, read};
extern const DecoderKernels avx2_decoder = {widen, narrow, normalize, gate, attend};
extern const AttentionKernels avx2_attention = {quantize_row, prepare_query, attend_piece<Avx2Lanes>};
}
