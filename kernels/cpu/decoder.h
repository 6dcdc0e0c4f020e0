// Tokens through one decoder layer of the Llama family: what the instruction sets supply, and what is handed over.
#pragma once
#include "job.h"

namespace int4 {

enum Dtype : int32_t { kFloat32, kBfloat16, kFloat16 };

// A vector of floats of some dtype; `data` is null where a layer has none.
struct Vector {
    const void* data;
    int32_t dtype;
};

struct Linear {
    Weight weight;  // no rows: absent
    Vector bias;
};

struct DecoderLayer {
    Linear qkv[3];      // their rows together: heads, then key heads twice, times head_dim
    Linear output;
    Linear gate_up[2];  // their rows together: twice the width of the MLP
    Linear down;
    Vector input_norm, mlp_norm, query_norm, key_norm;  // the last two per head, or null
    int64_t hidden, heads, key_heads, head_dim, rotary;
    float norm_epsilon, scaling;
};

// Keys or values of one head: [tokens, head_dim] of `dtype`.
struct AttentionHead {
    const float* queries;  // [group, head_dim], scaled
    const void *keys, *values;
    int64_t group, head_dim;
    int32_t dtype;
};

// Attention over a piece of the context, for the heads that share keys: their sums are not yet divided by their weights.
struct AttentionPart {
    float* sum;     // [group, head_dim]
    float* top;     // [group], the largest score
    float* weight;  // [group], the sum of exp(score - top)
};

constexpr int64_t kContextPiece = 256;

struct DecoderKernels {
    void (*widen)(const Vector&, int64_t count, float* out);
    void (*narrow)(const float* x, int32_t dtype, int64_t count, void* out);
    void (*normalize)(const float* x, const float* weight, int64_t count, float epsilon, float* out);
    void (*gate)(const float* gate, const float* up, int64_t count, float* out);
    void (*attend)(const AttentionHead&, int64_t begin, int64_t end, const AttentionPart& out);
};

extern const DecoderKernels portable_decoder;
#if defined(__x86_64__)
extern const DecoderKernels avx2_decoder;
extern const DecoderKernels avx512_decoder;
#endif

inline const DecoderKernels& decoder_kernels(int level) {
#if defined(__x86_64__)
    if (level >= 2) return avx512_decoder;
    if (level == 1) return avx2_decoder;
#endif
    (void)level;
    return portable_decoder;
}

}  // namespace int4
