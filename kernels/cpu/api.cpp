// The C interface, called through ctypes: no Python and no torch in it.
#include <chrono>

#include "amx.h"
#include "job.h"
#include "pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#endif

using namespace int4;

namespace {

constexpr int64_t kChunkBytes = 512 << 10;
constexpr int64_t kBatchedChunkRows = 32;

// From this many activations on tiles are faster, although they are only part full.
constexpr int64_t kTiledBatch = 6;

#if defined(__x86_64__)
// Whether the processor multiplies tiles of bytes and the system lets this process keep them.
bool has_amx() {
    unsigned a, b, c, d;
    constexpr unsigned kTiles = 1u << 24, kBytes = 1u << 25;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) == 0 || (d & kBytes) == 0) return false;
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

void fast_tiled(int threads, const Weight& w, const float* x, int64_t batch, const float* bias, float* out,
                void* workspace) {
    const int64_t padded = w.steps() * kStep, tiles = (batch + kTileActivations - 1) / kTileActivations;
    int8_t* values = static_cast<int8_t*>(workspace);
    const TiledActivations a{values, reinterpret_cast<float*>(values + tiles * kTileActivations * padded)};
    pool().run(threads, tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            amx_kernels.quantize(w, x, batch, t * kTileActivations, a.values + t * kTileActivations * padded,
                                 a.scale + t * kTileActivations * w.steps());
    });
    const int64_t share = (w.rows / (4 * threads) / kTileActivations + 1) * kTileActivations;
    pool().run(threads, w.rows, share,
               [&](int64_t begin, int64_t end) { amx_kernels.fast(w, a, batch, bias, out, begin, end); });
}
#endif

int64_t chunk_rows(const Weight& w, int64_t batch) {
    int64_t rows = kChunkBytes / (w.row_bytes() + 1) + 1;
    return batch > 1 && rows > kBatchedChunkRows ? kBatchedChunkRows : rows;
}

}  // namespace

extern "C" {

// The best level this processor has: 3 AVX512-VNNI with AMX, 2 AVX512-VNNI, 1 AVX2 with FMA, 0 plain C++.
int int4_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        return __builtin_cpu_supports("avx512vbmi") && has_amx() ? 3 : 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

// Bytes of workspace that int4_fast needs for its quantised activations.
int64_t int4_workspace_bytes(int64_t batch, int64_t inputs, int64_t group) {
    const int64_t steps = (inputs + kStep - 1) / kStep;
    const int64_t whole_tiles = (batch + kTileActivations - 1) / kTileActivations * kTileActivations;
    return whole_tiles * steps * (kStep + 8 * kSums) + batch * 4 * (inputs / group);
}

// out [batch, rows] = x [batch, inputs] times the weight, plus bias; activations rounded to int8 step by step.
void int4_fast(int level, int threads, const uint8_t* codes, const uint16_t* scale, int scale_is_bf16,
               const int32_t* zero, int64_t rows, int64_t inputs, int64_t group, int bits, const float* x,
               int64_t batch, const float* bias, float* out, void* workspace) {
    const Weight w{codes, scale, zero, rows, inputs, group, bits, scale_is_bf16 != 0};
#if defined(__x86_64__)
    const bool fits_tiles = w.bits == 4 || !w.zero;  // as signed bytes, less their zero points
    if (level == 3 && batch >= kTiledBatch && fits_tiles) return fast_tiled(threads, w, x, batch, bias, out, workspace);
#endif
    const int64_t steps = w.steps(), sums = steps * kSums;
    float* scales = static_cast<float*>(workspace);
    int32_t* centres = reinterpret_cast<int32_t*>(scales + batch * sums);
    float* group_sums = reinterpret_cast<float*>(centres + batch * sums);
    const Activations a{reinterpret_cast<int8_t*>(group_sums + batch * w.groups()), scales, centres, group_sums};
    const Kernels& k = kernels(level);
    pool().run(threads, batch, 4, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m)
            k.quantize(w, x + m * inputs, {a.values + m * steps * kStep, a.scale + m * sums, a.centre + m * sums,
                                           a.group_sum + m * w.groups()});
    });
    pool().run(threads, rows, chunk_rows(w, batch),
               [&](int64_t begin, int64_t end) { k.fast(w, a, batch, bias, {out, rows}, begin, end); });
}

// The same product with float32 activations.
void int4_exact(int level, int threads, const uint8_t* codes, const uint16_t* scale, int scale_is_bf16,
                const int32_t* zero, int64_t rows, int64_t inputs, int64_t group, int bits, const float* x,
                int64_t batch, const float* bias, float* out) {
    const Weight w{codes, scale, zero, rows, inputs, group, bits, scale_is_bf16 != 0};
    const Kernels& k = kernels(level);
    pool().run(threads, rows, chunk_rows(w, batch),
               [&](int64_t begin, int64_t end) { k.exact(w, x, inputs, batch, bias, {out, rows}, begin, end); });
}

// out [stop - start, inputs] = rows start..stop of the weight in float32.
void int4_dequantize(int level, int threads, const uint8_t* codes, const uint16_t* scale, int scale_is_bf16,
                     const int32_t* zero, int64_t rows, int64_t inputs, int64_t group, int bits, float* out,
                     int64_t start, int64_t stop) {
    const Weight w{codes, scale, zero, rows, inputs, group, bits, scale_is_bf16 != 0};
    const Kernels& k = kernels(level);
    pool().run(threads, stop - start, chunk_rows(w, 1), [&](int64_t begin, int64_t end) {
        k.dequantize(w, out + begin * inputs, start + begin, start + end);
    });
}

// Seconds to read `bytes` once with all threads: the limit that a product with one activation is held against.
double int4_read_seconds(int level, int threads, const uint8_t* data, int64_t bytes) {
    const Kernels& k = kernels(level);
    std::atomic<int64_t> total{0};
    const auto start = std::chrono::steady_clock::now();
    pool().run(threads, bytes, kChunkBytes,
               [&](int64_t begin, int64_t end) { total += k.read(data + begin, end - begin); });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    return total == INT64_MIN ? 0 : elapsed.count();  // the sum is used, so that no read can be left out
}
}
