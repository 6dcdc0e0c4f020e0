// The product in plain C++, for any machine.
#include "attention.h"
#include "decoder.h"

namespace {

constexpr int kTileRows = 1;
constexpr int kTileBatch = 4;

struct Codes {
    uint8_t even[64], odd[64];
};
struct Sums {
    int32_t quarter[4];  // 32 codes each, the smallest group
};
struct Scales {
    float quarter[4];
};
using Total = float;

template <int B>
inline Codes load_tail(const uint8_t* p, int64_t bytes) {
    Codes codes = {};
    for (int64_t i = 0; i < bytes; ++i) {
        if constexpr (B == 4) {
            codes.even[i] = p[i] & 15;
            codes.odd[i] = p[i] >> 4;
        } else {
            (i / 4 % 2 ? codes.odd : codes.even)[i / 8 * 4 + i % 4] = p[i];
        }
    }
    return codes;
}

template <int B>
inline Codes load(const uint8_t* p) {
    return load_tail<B>(p, int4::kStepBytes<B>);
}

inline Sums dot(const Codes& codes, const int8_t* x, const int32_t* centre) {
    Sums sums = {};
    for (int q = 0; q < 4; ++q) {
        for (int lane = 4 * q; lane < 4 * q + 4; ++lane) sums.quarter[q] += centre[lane];
        for (int i = 16 * q; i < 16 * q + 16; ++i) sums.quarter[q] += codes.even[i] * x[i] + codes.odd[i] * x[i + 64];
    }
    return sums;
}

template <int G>
inline Scales spread(const float* scale) {
    Scales scales;
    for (int q = 0; q < 4; ++q) scales.quarter[q] = scale[G == 32 ? q : G == 64 ? q / 2 : 0];
    return scales;
}

inline Scales load_scales(const float* scale) { return {{scale[0], scale[4], scale[8], scale[12]}}; }

inline Total add(Total total, const Sums& sums, const Scales& scales, const Scales& x_scales) {
    for (int q = 0; q < 4; ++q) total += float(sums.quarter[q]) * (scales.quarter[q] * x_scales.quarter[q]);
    return total;
}

inline float sum(Total total) { return total; }

#include "rows.h"

#include "lanes.h"

#include "attention_lanes.h"

}  // namespace

namespace int4 {
extern const Kernels portable_kernels = {quantize, fast, exact, dequantize, read};
extern const DecoderKernels portable_decoder = {widen, narrow, normalize, gate, attend};
extern const AttentionKernels portable_attention = {quantize_row, prepare_query, attend_piece<PlainLanes>};
}
