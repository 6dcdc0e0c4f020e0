// The interface of the tiled product, which takes a batch of activations at a time.
#pragma once
#include "job.h"

namespace int4 {

constexpr int64_t kTileActivations = 16;

// Activations as signed bytes, 16 of them interleaved in the layout of tiles; one float scale a step of each.
struct TiledActivations {
    int8_t* values;  // [M/16, K/64, 16, 16, 4], or [M/16, K/32, 8, 16, 4] for groups of 32; K padded to whole steps
    float* scale;    // [M/16, steps, 16]
};

struct TiledKernels {
    void (*quantize)(const Weight&, const float* x, int64_t batch, int64_t m, int8_t* values, float* scale);
    void (*fast)(const Weight&, const TiledActivations&, int64_t batch, const float* bias, float* out, int64_t begin,
                 int64_t end);
};

#if defined(__x86_64__)
extern const TiledKernels amx_kernels;
#endif

}  // namespace int4
