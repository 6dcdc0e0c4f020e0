// What one call of the int4 product is about, shared by the instruction sets and the C interface.
#pragma once
#include <cstdint>

namespace int4 {

// Codes are multiplied in steps of 128: 64 bytes of a row, and 64 even-k then 64 odd-k activations.
constexpr int64_t kStep = 128;

struct Weight {
    const uint8_t* codes;   // [N, K/2], k even in the low nibble
    const uint16_t* scale;  // [N, K/G], bf16 or fp16 bits
    const int32_t* zero;    // [ceil(N/8), K/G], row n in nibble n % 8; null when every zero point is 8
    int64_t rows, inputs, group;
    bool scale_is_bf16;

    int64_t groups() const { return inputs / group; }
    int64_t steps() const { return (inputs + kStep - 1) / kStep; }
    int64_t row_bytes() const { return inputs / 2; }
};

// Activations as signed bytes: one float scale a step, so that no product leaves 16 bits before it is widened.
struct Activations {
    int8_t* values;    // [M, steps, 128]
    float* scale;      // [M, steps]
    float* group_sum;  // [M, K/G], the dequantised sum over each weight group: what a zero point is multiplied by
};

struct Kernels {
    void (*quantize)(const float* x, int64_t inputs, int64_t group, int8_t* values, float* scale, float* group_sum);
    void (*fast)(const Weight&, const Activations&, int64_t batch, const float* bias, float* out, int64_t begin,
                 int64_t end);
    void (*exact)(const Weight&, const float* x, int64_t batch, const float* bias, float* out, int64_t begin,
                  int64_t end);
    void (*dequantize)(const Weight&, float* out, int64_t begin, int64_t end);
    int64_t (*read)(const uint8_t* data, int64_t bytes);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace int4
