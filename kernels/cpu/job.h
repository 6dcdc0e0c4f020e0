// What one call of the product is about, shared by the instruction sets and the C interface.
#pragma once
#include <cstdint>

namespace int4 {

// Codes are multiplied in steps of 128. The activations of a step are in the order that codes are taken apart in: all
// even runs of k, then all odd ones, where a run is one code of 4 bits, as they share a byte, and four of 8 bits.
constexpr int64_t kStep = 128;
template <int B>
constexpr int64_t kStepBytes = kStep * B / 8;

// Activations under one scale: the smallest weight group. Rounded so before an exact product they cost the embedded model
// 0.09% of perplexity, 64 under one scale 0.21% (WikiText-2, 8 windows); 128 cost 0.23% in the tiles of amx.cpp.
constexpr int64_t kScaled = 32;

struct Weight {
    const uint8_t* codes;   // [N, K*bits/8]; of 4 bits, k even in the low nibble
    const uint16_t* scale;  // [N, K/G], bf16 or fp16 bits
    const int32_t* zero;    // [ceil(N*bits/32), K/G], packed down the rows; null when every zero point is 2^(bits-1)
    int64_t rows, inputs, group;
    int bits;  // 4 or 8
    bool scale_is_bf16;

    int64_t middle() const { return zero ? 0 : int64_t(1) << (bits - 1); }  // the zero point of symmetric codes
    int64_t groups() const { return inputs / group; }
    int64_t steps() const { return (inputs + kStep - 1) / kStep; }
    int64_t row_bytes() const { return inputs * bits / 8; }
};

// Integer sums of a step are spread over 16 lanes, each of the products of four even and the four odd codes beside them.
constexpr int64_t kSums = 16;

// Activations as signed bytes, each 32 of them with a float scale; what a step needs is laid out lane by lane.
struct Activations {
    int8_t* values;    // [M, steps, 128], in the order of steps
    float* scale;      // [M, steps, 16]
    int32_t* centre;   // [M, steps, 16], less the middle of the codes times the sum of a lane: where its sum starts from
    float* group_sum;  // [M, K/G], the dequantised sum over each weight group: what a zero point is multiplied by
};

// [M, N], the rows `stride` apart.
struct Products {
    float* data;
    int64_t stride;
};

struct Kernels {
    void (*quantize)(const Weight&, const float* x, const Activations& out);  // one row of x
    void (*fast)(const Weight&, const Activations&, int64_t batch, const float* bias, const Products& out, int64_t begin,
                 int64_t end);
    void (*exact)(const Weight&, const float* x, int64_t x_stride, int64_t batch, const float* bias, const Products& out,
                  int64_t begin, int64_t end);
    void (*dequantize)(const Weight&, float* out, int64_t begin, int64_t end);
    int64_t (*read)(const uint8_t* data, int64_t bytes);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

inline const Kernels& kernels(int level) {
#if defined(__x86_64__)
    if (level >= 2) return avx512_kernels;
    if (level == 1) return avx2_kernels;
#endif
    (void)level;
    return portable_kernels;
}

}  // namespace int4
