// The product of rows of a weight with a few activations, over lanes that an instruction set supplies.
//
// Included by portable.cpp, avx2.cpp and avx512.cpp inside an unnamed namespace, after each has defined
//   load<B>(p), load_tail<B>(p, bytes)    128 codes of B bits, taken apart into even and odd runs
//   Sums, dot(codes, x, centre)           integer sums of 128 products, still spread over lanes, from `centre` on
//   Scales, spread<G>(s)                  the float scales of the groups in a step, one for each lane of Sums
//   load_scales(s)                        those that are laid out lane by lane
//   Total, add(total, sums, scales, xs)   total + sums * scales * xs, both for each lane
//   kTileRows, kTileBatch                 how many rows and activations share the registers
//
// Every output is accumulated in the same order whatever the batch, the tile or the number of threads.

constexpr int64_t kLanes = 16;
constexpr int64_t kFarBytes = 2048, kNearBytes = 512, kLineBytes = 64;

// Rows that one activation is multiplied with at once, far apart: memory gives most to several runs side by side.
// (Measured, 2 threads, Granite Rapids, groups of 64: 25 GB/s in 4 runs of 4 bits and 27 of 8, against 22 and 21 in one;
// a bare read gives 31. Neighbouring rows share pages, and two of them at once are slower than one.)
constexpr int kRuns = 4;

// Ask for the weights some rows ahead into the second cache and for the next into the first.
inline void prefetch(const uint8_t* p) {
    __builtin_prefetch(p + kFarBytes, 0, 2);
    __builtin_prefetch(p + kNearBytes);
}

inline float bf16_to_float(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, 4);
    return value;
}

inline float fp16_to_float(uint16_t bits) {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    uint32_t shifted = magnitude << 13, wide = shifted + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);
    float value;
    if (magnitude < 0x0400) {
        value = float(magnitude) * (1.0f / 16777216.0f);  // subnormal: a multiple of 2^-24
        return sign ? -value : value;
    }
    wide |= sign;
    __builtin_memcpy(&value, &wide, 4);
    return value;
}

inline float sum_products(const float* a, const float* b, int64_t count) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] += a[i + j] * b[i + j];
    float total = 0;
    for (int64_t j = 0; j < kLanes; ++j) total += lanes[j];
    for (; i < count; ++i) total += a[i] * b[i];
    return total;
}

template <int B>
inline int zero_of(const int4::Weight& w, int64_t row, int64_t group) {
    constexpr int64_t kWord = 32 / B;
    return w.zero ? (uint32_t(w.zero[row / kWord * w.groups() + group]) >> (B * (row % kWord))) & ((1 << B) - 1)
                  : 1 << (B - 1);
}

// The scales of one row as floats, padded with zeros to whole steps; and of codes with zero points, each times its own.
template <int B>
void row_scales(const int4::Weight& w, int64_t row, float* __restrict scale, float* __restrict scale_zero) {
    const uint16_t* __restrict bits = w.scale + row * w.groups();
    if (w.scale_is_bf16)
        for (int64_t g = 0; g < w.groups(); ++g) scale[g] = bf16_to_float(bits[g]);
    else
        for (int64_t g = 0; g < w.groups(); ++g) scale[g] = fp16_to_float(bits[g]);
    for (int64_t g = w.groups(); g < w.groups() + 4; ++g) scale[g] = 0;
    if (w.zero)
        for (int64_t g = 0; g < w.groups(); ++g) scale_zero[g] = scale[g] * float(zero_of<B>(w, row, g));
}

// The even runs of k, then the odd ones.
template <int Run>
inline void arrange(const int32_t* rounded, int8_t* values) {
    for (int64_t i = 0; i < int4::kStep / 2; ++i) {
        const int64_t even = i / Run * 2 * Run + i % Run;
        values[i] = int8_t(rounded[even]);
        values[i + int4::kStep / 2] = int8_t(rounded[even + Run]);
    }
}

// Round x to signed bytes, 32 under one scale. Of those that hold NaN or infinity the scale is NaN, and so is the output.
void quantize(const int4::Weight& w, const float* x, const int4::Activations& out) {
    constexpr int64_t kLanesPerScale = int4::kSums * int4::kScaled / int4::kStep;
    const int64_t inputs = w.inputs, group = w.group;
    int8_t* values = out.values;
    float* scale = out.scale;
    int32_t* centre = out.centre;
    for (int64_t g = 0; g < inputs / group; ++g) out.group_sum[g] = 0;
    for (int64_t start = 0; start < inputs; start += int4::kStep, values += int4::kStep) {
        float block[int4::kStep] = {};
        int32_t rounded[int4::kStep];
        int64_t count = inputs - start < int4::kStep ? inputs - start : int4::kStep;
        __builtin_memcpy(block, x + start, count * sizeof(float));
        for (int64_t part = 0; part < int4::kStep; part += int4::kScaled) {
            float top[kLanes] = {}, bad[kLanes] = {};
            for (int64_t i = part; i < part + int4::kScaled; i += kLanes)
                for (int64_t j = 0; j < kLanes; ++j) {
                    float magnitude = __builtin_fabsf(block[i + j]);
                    top[j] = magnitude > top[j] ? magnitude : top[j];
                    bad[j] += block[i + j] * 0.0f;
                }
            float largest = 0, finite = 0;
            for (int64_t j = 0; j < kLanes; ++j) {
                largest = top[j] > largest ? top[j] : largest;
                finite += bad[j];
            }
            const float unit = largest / 127 + finite;
            float inverse = largest > 1e-30f && finite == 0 ? 127 / largest : 0;
            int32_t sum = 0;
            for (int64_t i = part; i < part + int4::kScaled; ++i) {
                rounded[i] = int32_t(__builtin_rintf(block[i] * inverse));
                sum += rounded[i];
            }
            for (int64_t j = 0; j < kLanesPerScale; ++j) *scale++ = unit;
            if (part < count) out.group_sum[(start + part) / group] += float(sum) * unit;
        }
        (w.bits == 4 ? arrange<1> : arrange<4>)(rounded, values);
        for (int64_t lane = 0; lane < int4::kSums; ++lane) {
            int32_t sum = 0;
            for (int64_t i = 4 * lane; i < 4 * lane + 4; ++i) sum += values[i] + values[i + int4::kStep / 2];
            *centre++ = -int32_t(w.middle()) * sum;
        }
    }
}

// R rows from `row`, `apart` from each other, times T activations from `m`. G is 32, 64, 128, or 0 for one group a row; B is
// the bits of a code.
//
// While several activations are multiplied, the R rows behind these are asked for, also where the tile before has left
// them in the second cache. (Measured, Zen 4, 16 and 64 activations, ten shapes: where only the first tile asks, AVX512
// takes as long or up to twice as long, AVX2 0.8 to 1.4 times as long.)
//
// The loops over a tile are unrolled and its sums taken out of it at once: indexed by a variable, `total` would be kept in
// memory, and stored at every step (measured, Zen 4, 64 activations: a tenth of the time with AVX512, a fifth with AVX2).
template <int B, int G, int R, int T>
inline void tile(const int4::Weight& w, const int4::Activations& x, const float* scale, const float* scale_zero,
                 int64_t stride, const float* bias, const int4::Products& out, int64_t row, int64_t m, int64_t apart = 1) {
    const int64_t steps = w.steps(), whole = w.inputs / int4::kStep, tail_bytes = w.row_bytes() - whole * int4::kStepBytes<B>;
    Total total[R][T] = {};
    for (int64_t s = 0; s < steps; ++s) {
        decltype(load<B>(nullptr)) codes[R];
        Scales scales[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const uint8_t* p = w.codes + (row + r * apart) * w.row_bytes() + s * int4::kStepBytes<B>;
            for (int64_t line = 0; line < int4::kStepBytes<B>; line += kLineBytes) {
                if (T == 1)
                    prefetch(p + line);
                else
                    __builtin_prefetch(p + R * w.row_bytes() + line, 0, 2);
            }
            codes[r] = s < whole ? load<B>(p) : load_tail<B>(p, tail_bytes);
            scales[r] = spread<G>(scale + r * stride + (G ? s * (int4::kStep / (G ? G : 1)) : 0));
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const int64_t step = (m + t) * steps + s;
            const int8_t* values = x.values + step * int4::kStep;
            const int32_t* centre = x.centre + step * int4::kSums;
            const Scales x_scales = load_scales(x.scale + step * int4::kSums);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                total[r][t] = add(total[r][t], dot(codes[r], values, centre), scales[r], x_scales);
        }
    }
    float sums[R][T];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) sums[r][t] = sum(total[r][t]);
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) {
            const int64_t at = row + r * apart;
            const float* group_sum = x.group_sum + (m + t) * w.groups();
            const float offset = w.zero ? sum_products(scale_zero + r * stride, group_sum, w.groups()) : 0;
            out.data[(m + t) * out.stride + at] = sums[r][t] - offset + (bias ? bias[at] : 0);
        }
}

// At most kTileBatch activations.
template <int B, int G, int R>
inline void row_block(const int4::Weight& w, const int4::Activations& x, int64_t m, int64_t m_end, const float* bias,
                      const int4::Products& out, int64_t row, float* scratch, int64_t stride) {
    float *scale = scratch, *scale_zero = scratch + R * stride;
    for (int r = 0; r < R; ++r) row_scales<B>(w, row + r, scale + r * stride, scale_zero + r * stride);
    if (m + kTileBatch == m_end)
        return tile<B, G, R, kTileBatch>(w, x, scale, scale_zero, stride, bias, out, row, m);
    for (; m + 2 <= m_end; m += 2) tile<B, G, R, 2>(w, x, scale, scale_zero, stride, bias, out, row, m);
    for (; m < m_end; ++m) tile<B, G, R, 1>(w, x, scale, scale_zero, stride, bias, out, row, m);
}

// Rows from `begin` times activation `m`, in runs side by side; returns the first row that is left over.
template <int B, int G>
int64_t side_by_side(const int4::Weight& w, const int4::Activations& x, int64_t m, const float* bias,
                     const int4::Products& out, int64_t begin, int64_t end, float* scratch, int64_t stride) {
    const int64_t apart = (end - begin) / kRuns;
    float *scale = scratch, *scale_zero = scratch + kRuns * stride;
    for (int64_t row = begin; row < begin + apart; ++row) {
        for (int r = 0; r < kRuns; ++r)
            row_scales<B>(w, row + r * apart, scale + r * stride, scale_zero + r * stride);
        tile<B, G, kRuns, 1>(w, x, scale, scale_zero, stride, bias, out, row, m, apart);
    }
    return begin + kRuns * apart;
}

template <int B, int G>
void fast_rows(const int4::Weight& w, const int4::Activations& x, int64_t batch, const float* bias,
               const int4::Products& out, int64_t begin, int64_t end) {
    const int64_t stride = w.groups() + 4;
    float* scratch = new float[2 * (kRuns > kTileRows ? kRuns : kTileRows) * stride];
    for (int64_t m = 0; m < batch; m += kTileBatch) {
        const int64_t m_end = m + kTileBatch < batch ? m + kTileBatch : batch;
        int64_t row = begin;
        if (m_end - m == 1) row = side_by_side<B, G>(w, x, m, bias, out, begin, end, scratch, stride);
        for (; row + kTileRows <= end; row += kTileRows)
            row_block<B, G, kTileRows>(w, x, m, m_end, bias, out, row, scratch, stride);
        for (; row < end; ++row) row_block<B, G, 1>(w, x, m, m_end, bias, out, row, scratch, stride);
    }
    delete[] scratch;
}

template <int B>
void fast_groups(const int4::Weight& w, const int4::Activations& x, int64_t batch, const float* bias,
                 const int4::Products& out, int64_t begin, int64_t end) {
    auto rows = w.group == w.inputs ? fast_rows<B, 0>
                : w.group == 32     ? fast_rows<B, 32>
                : w.group == 64     ? fast_rows<B, 64>
                                    : fast_rows<B, 128>;
    rows(w, x, batch, bias, out, begin, end);
}

void fast(const int4::Weight& w, const int4::Activations& x, int64_t batch, const float* bias, const int4::Products& out,
          int64_t begin, int64_t end) {
    (w.bits == 4 ? fast_groups<4> : fast_groups<8>)(w, x, batch, bias, out, begin, end);
}

template <int B>
void dequantize_row(const int4::Weight& w, int64_t row, float* out) {
    const uint8_t* codes = w.codes + row * w.row_bytes();
    for (int64_t g = 0; g < w.groups(); ++g) {
        const uint16_t bits = w.scale[row * w.groups() + g];
        const float scale = w.scale_is_bf16 ? bf16_to_float(bits) : fp16_to_float(bits);
        const int zero = zero_of<B>(w, row, g);
        if constexpr (B == 4) {
            for (int64_t i = 0; i < w.group / 2; ++i) {
                const uint8_t pair = codes[g * w.group / 2 + i];
                out[g * w.group + 2 * i] = float(int(pair & 15) - zero) * scale;
                out[g * w.group + 2 * i + 1] = float(int(pair >> 4) - zero) * scale;
            }
        } else {
            for (int64_t k = g * w.group; k < (g + 1) * w.group; ++k) out[k] = float(int(codes[k]) - zero) * scale;
        }
    }
}

void dequantize(const int4::Weight& w, float* out, int64_t begin, int64_t end) {
    const auto dequantize_one = w.bits == 4 ? dequantize_row<4> : dequantize_row<8>;
    for (int64_t row = begin; row < end; ++row) dequantize_one(w, row, out + (row - begin) * w.inputs);
}

void exact(const int4::Weight& w, const float* x, int64_t x_stride, int64_t batch, const float* bias,
           const int4::Products& out, int64_t begin, int64_t end) {
    const auto dequantize_one = w.bits == 4 ? dequantize_row<4> : dequantize_row<8>;
    float* values = new float[w.inputs];
    for (int64_t row = begin; row < end; ++row) {
        dequantize_one(w, row, values);
        for (int64_t m = 0; m < batch; ++m)
            out.data[m * out.stride + row] =
                sum_products(values, x + m * x_stride, w.inputs) + (bias ? bias[row] : 0);
    }
    delete[] values;
}

// Touch every byte once, in several runs side by side: what memory gives to a loop that does nothing else. (Measured,
// 2 threads, Granite Rapids, 960 MiB: 33 GB/s in 8 runs that prefetch 1 KiB ahead, 28 in one run of the same loads.)
int64_t read(const uint8_t* data, int64_t bytes) {
    constexpr int64_t kRuns = 8, kAheadBytes = 1024;
    const int64_t run = bytes / kRuns / kLineBytes * kLineBytes;
    int64_t lanes[8] = {};
    const auto add = [&](const uint8_t* line) {
        int64_t words[8];
        __builtin_memcpy(words, line, 64);
        for (int j = 0; j < 8; ++j) lanes[j] += words[j];
    };
    for (int64_t i = 0; i < run; i += kLineBytes)
        for (const uint8_t* line = data + i; line < data + kRuns * run; line += run) {
            __builtin_prefetch(line + kAheadBytes);
            add(line);
        }
    for (int64_t i = kRuns * run; i + kLineBytes <= bytes; i += kLineBytes) add(data + i);
    int64_t total = 0;
    for (int j = 0; j < 8; ++j) total += lanes[j];
    return total;
}
