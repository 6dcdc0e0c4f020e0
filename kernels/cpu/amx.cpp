// The product of a batch with AMX: tiles of 16 rows times 16 activations, in signed bytes.
//
// A row's codes minus their zero points lie in -15..15, or in -128..127 for symmetric ones of 8 bits, so there is no zero
// point left to correct for; asymmetric ones of 8 bits do not fit and are left to the other kernels. 16 rows are
// unpacked once into the layout of tiles, and then meet every activation. The integer sums of a step (a scale group, or
// 128 codes) leave the tile, are scaled, and are accumulated in 16 registers of floats.
//
// Rounding activations 128 at a time costs the embedded model 0.23% of perplexity (WikiText-2, 8 windows). Tiles of
// bfloat16 would cost next to nothing, but ran at 0.55 to 0.6 of this speed (128 and 512 activations, 4096 x 4096).
#include <immintrin.h>

#include "amx.h"

namespace {

constexpr int kTile = 16;           // rows of a tile, and activations of one
constexpr int64_t kBlock = 64;      // codes in one row of a tile
constexpr int64_t kPanelBytes = 512 << 10;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0, 1: sums. 2, 3: rows of the weight, `width` codes each. 4, 5: activations, four codes deep.
void configure(int width) {
    TileConfig config;
    for (int t = 0; t < 2; ++t) {
        config.rows[t] = config.rows[2 + t] = kTile;
        config.row_bytes[t] = config.row_bytes[4 + t] = 64;
        config.row_bytes[2 + t] = uint16_t(width);
        config.rows[4 + t] = uint8_t(width / 4);
    }
    _tile_loadconfig(&config);
}

// Codes under one scale of the weight and one of the activations.
inline int64_t step_of(const int4::Weight& w) {
    return w.groups() > 1 && w.group < int4::kStep ? w.group : int4::kStep;
}

// 64 codes as signed bytes less their zero points, the even k of each piece of W before the odd ones.
template <int W>
inline __m512i centred(__m256i pairs, __m512i zero) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(pairs, mask), high = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), mask);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    const __m512i ordered = W == 64 ? both : _mm512_permutexvar_epi64(_mm512_set_epi64(7, 6, 3, 2, 5, 4, 1, 0), both);
    return _mm512_sub_epi8(ordered, zero);
}

// `count` scales as floats; those past `known` are 0, so that what is padded counts nothing.
inline void widen(const uint16_t* bits, bool bf16, int64_t known, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += kTile) {
        const int64_t left = known - i;
        const __mmask16 inside = left >= kTile ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
        const __m256i half = _mm256_maskz_loadu_epi16(inside, bits + i);
        _mm512_storeu_ps(out + i, bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))
                                       : _mm512_cvtph_ps(half));
    }
}

// 64 codes as signed bytes less their zero points, in the order that `quantize` gives to activations. `bytes` counts
// those of the row that are left.
template <int B, int W>
inline __m512i load(const uint8_t* p, int64_t bytes, __m512i zero) {
    if constexpr (B == 4) {
        const __mmask32 inside = bytes >= 32 ? ~0u : bytes > 0 ? (1u << bytes) - 1 : 0;
        return centred<W>(_mm256_maskz_loadu_epi8(inside, p), zero);
    } else {
        const __mmask64 inside = bytes >= 64 ? ~0ull : bytes > 0 ? (1ull << bytes) - 1 : 0;
        return _mm512_sub_epi8(_mm512_maskz_loadu_epi8(inside, p), zero);
    }
}

// panel [blocks, 16, 64] of rows row..row+16, and their scales [16, stride]; rows past the end are zero.
template <int B, int W>
void unpack(const int4::Weight& w, int64_t row, int64_t stride, int8_t* panel, float* scale) {
    constexpr int64_t kBlockBytes = kBlock * B / 8;
    const int64_t blocks = w.steps() * int4::kStep / kBlock, groups = w.groups(), row_bytes = w.row_bytes();
    const int64_t group_blocks = groups == 1 ? blocks : w.group > kBlock ? w.group / kBlock : 1;
    for (int r = 0; r < kTile; ++r, panel += kBlock, scale += stride) {
        const bool inside = row + r < w.rows;
        widen(w.scale + (row + r) * groups, w.scale_is_bf16, inside ? groups : 0, stride, scale);
        if (!inside) {
            for (int64_t b = 0; b < blocks; ++b) _mm512_store_si512(panel + b * kTile * kBlock, _mm512_setzero_si512());
            continue;
        }
        const uint8_t* codes = w.codes + (row + r) * row_bytes;
        const int32_t* zeros = w.zero ? w.zero + (row + r) / 8 * groups : nullptr;
        const int shift = 4 * ((row + r) % 8);
        const auto zero_of = [&](int64_t g) { return char(g < groups ? (uint32_t(zeros[g]) >> shift) & 15 : 0); };
        __m512i zero = _mm512_set1_epi8(char(1 << (B - 1)));
        for (int64_t b = 0, left = 0, g = 0; b < blocks; ++b, --left) {
            if (zeros && left == 0) {
                zero = _mm512_set1_epi8(zero_of(g++));
                if (W == 32) zero = _mm512_inserti64x4(zero, _mm256_set1_epi8(zero_of(g++)), 1);
                left = group_blocks;
            }
            const uint8_t* p = codes + b * kBlockBytes;
            __builtin_prefetch(p + 4096, 0, 2);
            _mm512_store_si512(panel + b * kTile * kBlock, load<B, W>(p, row_bytes - b * kBlockBytes, zero));
        }
    }
}

// Sums of one step into `sums`, through the tiles 0, 2, 4 or 1, 3, 5: their numbers are part of the instructions.
template <int S, int W>
inline void multiply(const int8_t* panel, const int8_t* x, int64_t pieces, int32_t (*sums)[kTile]) {
    if (S == 0)
        _tile_zero(0);
    else
        _tile_zero(1);
    for (int64_t p = 0; p < pieces; ++p, panel += kTile * kBlock, x += kTile * W) {
        if (S == 0) {
            _tile_loadd(2, panel, kBlock);
            _tile_loadd(4, x, 64);
            _tile_dpbssd(0, 2, 4);
        } else {
            _tile_loadd(3, panel, kBlock);
            _tile_loadd(5, x, 64);
            _tile_dpbssd(1, 3, 5);
        }
    }
    if (S == 0)
        _tile_stored(0, sums, 64);
    else
        _tile_stored(1, sums, 64);
}

inline void transpose(__m512 (&r)[kTile]) {
    __m512 t[kTile], u[kTile];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(t[4 * i + j]), b = _mm512_castps_pd(t[4 * i + 2 + j]);
            u[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            u[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int j = 0; j < 4; ++j) {
        const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
        const __m512 c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
        const __m512 d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
        r[j] = _mm512_shuffle_f32x4(a, c, 0x88);
        r[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
        r[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
        r[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}

// 16 rows times 16 activations over all of K. Two tiles of sums take turns, so that one is scaled while one is filled.
template <int W>
void tile(const int8_t* panel, const float* scale, int64_t stride, bool one_scale, const int8_t* x,
          const float* x_scale, int64_t step, int64_t steps, __m512 (&total)[kTile]) {
    alignas(64) int32_t sums[2][kTile][kTile];
    const int64_t pieces = step / W;
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) total[r] = _mm512_setzero_ps();
    const auto fill = [&](int64_t s) {
        // a piece of 32 codes is half a block: its rows stay a block apart
        const int8_t* rows = W == 64 ? panel + s * pieces * kTile * kBlock : panel + s / 2 * kTile * kBlock + s % 2 * 32;
        const int8_t* activations = x + s * pieces * kTile * W;
        if (s % 2 == 0)
            multiply<0, W>(rows, activations, pieces, sums[0]);
        else
            multiply<1, W>(rows, activations, pieces, sums[1]);
    };
    fill(0);
    for (int64_t s = 0; s < steps; ++s) {
        if (s + 1 < steps) fill(s + 1);
        const __m512 xs = _mm512_loadu_ps(x_scale + s * step / int4::kStep * kTile);
#pragma GCC unroll 16
        for (int r = 0; r < kTile; ++r)
            total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[s % 2][r])),
                                       _mm512_mul_ps(_mm512_set1_ps(scale[r * stride + (one_scale ? 0 : s)]), xs), total[r]);
    }
    transpose(total);
}

template <int B, int W>
void rows_of(const int4::Weight& w, const int4::TiledActivations& x, int64_t batch, const float* bias, float* out,
             int64_t begin, int64_t end) {
    const int64_t step = step_of(w), steps = w.steps() * int4::kStep / step;
    const int64_t padded = w.steps() * int4::kStep, together = (kPanelBytes / (kTile * padded) + 1) * kTile;
    const int64_t stride = (steps + kTile - 1) / kTile * kTile;
    int8_t* panels = static_cast<int8_t*>(_mm_malloc(together * (padded + 4 * stride), 64));
    float* scales = reinterpret_cast<float*>(panels + together * padded);
    configure(W);
    for (int64_t first = begin; first < end; first += together) {
        const int64_t last = first + together < end ? first + together : end;
        for (int64_t row = first; row < last; row += kTile)
            unpack<B, W>(w, row, stride, panels + (row - first) * padded, scales + (row - first) * stride);
        for (int64_t m = 0; m < batch; m += kTile)
            for (int64_t row = first; row < last; row += kTile) {
                __m512 total[kTile];
                tile<W>(panels + (row - first) * padded, scales + (row - first) * stride, stride, w.groups() == 1,
                        x.values + m * padded, x.scale + m * w.steps(), step, steps, total);
                const __mmask16 inside = last - row < kTile ? (1u << (last - row)) - 1 : 0xffff;
                const __m512 added = bias ? _mm512_maskz_loadu_ps(inside, bias + row) : _mm512_setzero_ps();
                for (int t = 0; t < kTile && m + t < batch; ++t)
                    _mm512_mask_storeu_ps(out + (m + t) * w.rows + row, inside, _mm512_add_ps(total[t], added));
            }
    }
    _tile_release();
    _mm_free(panels);
}

void fast(const int4::Weight& w, const int4::TiledActivations& x, int64_t batch, const float* bias, float* out,
          int64_t begin, int64_t end) {
    const bool halves = step_of(w) == 32;
    (w.bits == 4 ? halves ? rows_of<4, 32> : rows_of<4, 64>
                 : halves ? rows_of<8, 32> : rows_of<8, 64>)(w, x, batch, bias, out, begin, end);
}

// Rows m..m+16 of x as signed bytes in the layout of tiles; rows past `batch` are zero. A step that holds NaN or
// infinity gets the scale NaN, and so does its output.
void quantize(const int4::Weight& w, const float* x, int64_t batch, int64_t m, int8_t* values, float* scale) {
    const bool halves = step_of(w) == 32;
    alignas(64) int8_t order[kBlock];
    for (int i = 0; i < kBlock; ++i) {
        const int width = halves ? 32 : 64, piece = i / width * width, j = i % width;
        order[i] = int8_t(w.bits == 8 ? i : piece + (j < width / 2 ? 2 * j : 2 * (j - width / 2) + 1));
    }
    const __m512i in_order = _mm512_load_si512(order);
    const __m512i four_apart = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                                  _mm512_set1_epi32(kTile));
    for (int t = 0; t < kTile; ++t)
        for (int64_t s = 0; s < w.steps(); ++s) {
            const int64_t start = s * int4::kStep, left = w.inputs - start;
            __m512 part[8], top = _mm512_setzero_ps(), bad = _mm512_setzero_ps();
            for (int i = 0; i < 8; ++i) {
                const int64_t count = m + t < batch ? left - 16 * i : 0;
                const __mmask16 inside = count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0;
                part[i] = _mm512_maskz_loadu_ps(inside, x + (m + t) * w.inputs + start + 16 * i);
                top = _mm512_max_ps(top, _mm512_abs_ps(part[i]));
                bad = _mm512_fmadd_ps(part[i], _mm512_setzero_ps(), bad);
            }
            const float largest = _mm512_reduce_max_ps(top), finite = _mm512_reduce_add_ps(bad);
            scale[s * kTile + t] = largest / 127 + finite;
            const __m512 inverse = _mm512_set1_ps(largest > 1e-30f && finite == 0 ? 127 / largest : 0);
            alignas(64) int8_t rounded[int4::kStep];
            for (int i = 0; i < 8; ++i)
                _mm_store_si128(reinterpret_cast<__m128i*>(rounded + 16 * i),
                                _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(part[i], inverse))));
            for (int64_t block = 0; block < int4::kStep; block += kBlock) {
                const __m512i ordered = _mm512_permutexvar_epi8(in_order, _mm512_load_si512(rounded + block));
                _mm512_i32scatter_epi32(values + (start + block) * kTile + 4 * t, four_apart, ordered, 4);
            }
        }
}

}  // namespace

namespace int4 {
extern const TiledKernels amx_kernels = {quantize, fast};
}
