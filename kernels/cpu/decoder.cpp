// One token through one decoder layer, in one call: what remains of a layer's time is what its weights take to be read.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"

using namespace int4;

namespace {

constexpr int64_t kLargestShareBytes = 512 << 10, kSmallestShareBytes = 32 << 10;
constexpr int64_t kShares = 4;  // of a product for each thread, so that one that is held up is not waited for

struct KeyValues {
    uint8_t *keys, *values;  // [key_heads, capacity, head_dim]
    int32_t dtype;
    int64_t capacity, tokens;

    int64_t element_bytes() const { return dtype == kFloat32 ? 4 : 2; }
};

// Kept between calls: a token passes through many layers of one size.
struct Scratch {
    std::vector<float> residual, normed, wide, mixed, vector, angles, sums, tops, scales, group_sums;
    std::vector<int8_t> values;
    std::vector<int32_t> centres;
    std::vector<uint8_t> workspace;
};

Scratch& scratch() {
    static thread_local Scratch buffers;
    return buffers;
}

class Step {
  public:
    Step(int level, int threads, bool exact, const DecoderLayer& layer, Scratch& buffers)
        : products_(kernels(level)), lanes_(decoder_kernels(level)), level_(level), threads_(threads), exact_(exact),
          layer_(layer), buffers_(buffers) {}

    // Past: KeyValues, or a KvContext of 8-bit blocks with room for one token more.
    template <class Past>
    void run(const Vector& hidden, const Vector& cos, const Vector& sin, const Past& past, void* out) {
        append(hidden, cos, sin, past);
        attend(buffers_.wide.data(), past);
        finish(hidden, out);
    }

    // Up to attention: the scaled queries are left in `wide`, the key and the value behind the past.
    template <class Past>
    void append(const Vector& hidden, const Vector& cos, const Vector& sin, const Past& past) {
        resize();
        lanes_.widen(hidden, layer_.hidden, buffers_.residual.data());
        normalize(layer_.input_norm, layer_.hidden, buffers_.residual.data(), buffers_.normed.data());
        product(layer_.qkv, 3, buffers_.normed.data(), buffers_.wide.data());
        rotate(cos, sin, buffers_.wide.data());
        write(buffers_.wide.data() + layer_.heads * layer_.head_dim, past);
    }

    // After attention, whose result is in `mixed`.
    void finish(const Vector& hidden, void* out) {
        const int64_t mlp = layer_.down.weight.inputs;
        resize();
        lanes_.widen(hidden, layer_.hidden, buffers_.residual.data());
        add_product(layer_.output, buffers_.mixed.data());
        normalize(layer_.mlp_norm, layer_.hidden, buffers_.residual.data(), buffers_.normed.data());
        product(layer_.gate_up, 2, buffers_.normed.data(), buffers_.wide.data());
        lanes_.gate(buffers_.wide.data(), buffers_.wide.data() + mlp, mlp, buffers_.mixed.data());
        add_product(layer_.down, buffers_.mixed.data());
        lanes_.narrow(buffers_.residual.data(), hidden.dtype, layer_.hidden, out);
    }

  private:
    void resize() {
        const int64_t qkv = (layer_.heads + 2 * layer_.key_heads) * layer_.head_dim;
        const int64_t widest = std::max({qkv, 2 * layer_.down.weight.inputs, layer_.hidden});
        buffers_.residual.resize(layer_.hidden);
        for (auto* buffer : {&buffers_.normed, &buffers_.wide, &buffers_.mixed, &buffers_.vector})
            buffer->resize(widest);
    }

    void normalize(const Vector& norm, int64_t count, const float* x, float* out) {
        lanes_.widen(norm, count, buffers_.vector.data());
        lanes_.normalize(x, buffers_.vector.data(), count, layer_.norm_epsilon, out);
    }

    // out = x times each of the weights, one after the other, plus its bias. Those without rows come last.
    void product(const Linear* linears, int count, const float* x, float* out) {
        for (int together; count > 0 && linears->weight.rows; linears += together, count -= together) {
            together = alike(linears, count);
            const Weight& first = linears[0].weight;
            const Activations activations = exact_ ? Activations{} : quantize(first, x);
            int64_t rows = 0;
            for (int i = 0; i < together; ++i) rows += linears[i].weight.rows;
            const int64_t share = std::clamp(rows * first.row_bytes() / (kShares * threads_), kSmallestShareBytes,
                                             kLargestShareBytes);
            pool().run(threads_, rows, share / (first.row_bytes() + 1) + 1, [&](int64_t begin, int64_t end) {
                multiply(linears, together, x, activations, begin, end, out);
            });
            for (int i = 0; i < together; ++i) out = add_bias(linears[i], out);
        }
    }

    // How many of the weights, from the first on, can take the same quantised activations.
    static int alike(const Linear* linears, int count) {
        int same = 1;
        while (same < count && linears[same].weight.bits == linears[0].weight.bits &&
               linears[same].weight.group == linears[0].weight.group &&
               linears[same].weight.middle() == linears[0].weight.middle())
            ++same;
        return same;
    }

    Activations quantize(const Weight& w, const float* x) {
        buffers_.values.resize(w.steps() * kStep);
        buffers_.scales.resize(w.steps() * kSums);
        buffers_.centres.resize(w.steps() * kSums);
        buffers_.group_sums.resize(w.groups());
        const Activations activations{buffers_.values.data(), buffers_.scales.data(), buffers_.centres.data(),
                                      buffers_.group_sums.data()};
        products_.quantize(w, x, activations);
        return activations;
    }

    void multiply(const Linear* linears, int count, const float* x, const Activations& activations, int64_t begin,
                  int64_t end, float* out) const {
        for (int i = 0; i < count && end > 0; ++i) {
            const Weight& w = linears[i].weight;
            const int64_t last = std::min(end, w.rows);
            if (begin < last) {
                if (exact_)
                    products_.exact(w, x, 1, nullptr, out, begin, last);
                else
                    products_.fast(w, activations, 1, nullptr, out, begin, last);
            }
            begin = std::max<int64_t>(begin - w.rows, 0);
            end -= w.rows;
            out += w.rows;
        }
    }

    float* add_bias(const Linear& linear, float* out) {
        if (linear.bias.data) {
            lanes_.widen(linear.bias, linear.weight.rows, buffers_.vector.data());
            for (int64_t i = 0; i < linear.weight.rows; ++i) out[i] += buffers_.vector[i];
        }
        return out + linear.weight.rows;
    }

    void add_product(const Linear& linear, const float* x) {
        product(&linear, 1, x, buffers_.normed.data());
        for (int64_t i = 0; i < layer_.hidden; ++i) buffers_.residual[i] += buffers_.normed[i];
    }

    // Norms of heads, where there are some, then positions as rotations (arXiv:2104.09864), the halves of a head paired.
    void rotate(const Vector& cos, const Vector& sin, float* qkv) {
        const int64_t dim = layer_.head_dim, half = layer_.rotary / 2;
        buffers_.angles.resize(2 * layer_.rotary);
        float *cosines = buffers_.angles.data(), *sines = cosines + layer_.rotary;
        lanes_.widen(cos, layer_.rotary, cosines);
        lanes_.widen(sin, layer_.rotary, sines);
        for (int64_t h = 0; h < layer_.heads + layer_.key_heads; ++h) {
            float* x = qkv + h * dim;
            const Vector& norm = h < layer_.heads ? layer_.query_norm : layer_.key_norm;
            if (norm.data) normalize(norm, dim, x, x);
            for (int64_t i = 0; i < half; ++i) {
                const float a = x[i], b = x[i + half];
                x[i] = a * cosines[i] - b * sines[i];
                x[i + half] = b * cosines[i + half] + a * sines[i + half];
            }
            if (h < layer_.heads)
                for (int64_t i = 0; i < dim; ++i) x[i] *= layer_.scaling;
        }
    }

    // Write the token's keys and values behind those of the `tokens` before it.
    void write(const float* keys, const KeyValues& cache) {
        const int64_t dim = layer_.head_dim, size = cache.element_bytes();
        const float* values = keys + layer_.key_heads * dim;
        for (int64_t h = 0; h < layer_.key_heads; ++h) {
            const int64_t place = (h * cache.capacity + cache.tokens) * dim * size;
            lanes_.narrow(keys + h * dim, cache.dtype, dim, cache.keys + place);
            lanes_.narrow(values + h * dim, cache.dtype, dim, cache.values + place);
        }
    }

    void write(const float* keys, const KvContext& past) {
        const int64_t dim = layer_.head_dim;
        const Rows new_keys{keys, kFloat32, {0, dim, 0}}, new_values{keys + layer_.key_heads * dim, kFloat32, {0, dim, 0}};
        append_tokens(level_, threads_, past, new_keys, new_values, 1);
    }

    void attend(const float* queries, const KvContext& past) {
        AttentionJob job{past, {queries, kFloat32, {0, layer_.head_dim, 0}}, layer_.heads, 1, 1.0f, nullptr, 0};
        ++job.context.tokens;
        buffers_.workspace.resize(attention_workspace_bytes(past.shape, layer_.heads, 1, job.context.tokens));
        attend_pieces(level_, threads_, job, 0, job.context.tokens, buffers_.workspace.data());
        merge_pieces(level_, job, buffers_.workspace.data(), kFloat32, buffers_.mixed.data());
    }

    // Attention by pieces of the context, merged in order: the result does not depend on the number of threads.
    void attend(const float* queries, const KeyValues& cache) {
        const int64_t dim = layer_.head_dim, group = layer_.heads / layer_.key_heads, tokens = cache.tokens + 1;
        const int64_t pieces = (tokens + kContextPiece - 1) / kContextPiece;
        buffers_.sums.resize(layer_.heads * pieces * dim);
        buffers_.tops.resize(2 * layer_.heads * pieces);
        const auto part = [&](int64_t h, int64_t p) {
            const int64_t at = (h * pieces + p) * group;
            float* top = buffers_.tops.data() + at;
            return AttentionPart{buffers_.sums.data() + at * dim, top, top + layer_.heads * pieces};
        };
        pool().run(threads_, layer_.key_heads * pieces, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t h = i / pieces, p = i % pieces;
                const int64_t start = h * cache.capacity * dim * cache.element_bytes();
                const AttentionHead head{queries + h * group * dim, cache.keys + start, cache.values + start,
                                         group, dim, cache.dtype};
                lanes_.attend(head, p * kContextPiece, std::min((p + 1) * kContextPiece, tokens), part(h, p));
            }
        });
        for (int64_t h = 0; h < layer_.key_heads; ++h)
            for (int64_t g = 0; g < group; ++g) merge(h, g, pieces, part, buffers_.mixed.data() + (h * group + g) * dim);
    }

    template <class Part>
    void merge(int64_t h, int64_t g, int64_t pieces, const Part& part, float* out) const {
        const int64_t dim = layer_.head_dim;
        float top = part(h, 0).top[g], weight = 0;
        for (int64_t p = 1; p < pieces; ++p) top = std::max(top, part(h, p).top[g]);
        std::fill(out, out + dim, 0.0f);
        for (int64_t p = 0; p < pieces; ++p) {
            const float share = std::exp(part(h, p).top[g] - top);
            weight += share * part(h, p).weight[g];
            for (int64_t d = 0; d < dim; ++d) out[d] += share * part(h, p).sum[g * dim + d];
        }
        for (int64_t d = 0; d < dim; ++d) out[d] /= weight;
    }

    const Kernels& products_;
    const DecoderKernels& lanes_;
    const int level_, threads_;
    const bool exact_;
    const DecoderLayer& layer_;
    Scratch& buffers_;
};

}  // namespace

extern "C" {

// Bytes of the layer's description, as the caller lays it out.
int64_t int4_decoder_layer_bytes() { return sizeof(DecoderLayer); }

// out [hidden] = the layer's output for one token, both of `dtype`; its keys and values are appended to the cache,
// [key_heads, capacity, head_dim] each, which holds `tokens` before. cos, sin: [rotary] of `dtype`.
void int4_decode(int level, int threads, int exact, const DecoderLayer* layer, const void* hidden, int dtype,
                 const void* cos, const void* sin, void* keys, void* values, int cache_dtype, int64_t capacity,
                 int64_t tokens, void* out) {
    const KeyValues cache{static_cast<uint8_t*>(keys), static_cast<uint8_t*>(values), cache_dtype, capacity, tokens};
    Step(level, threads, exact != 0, *layer, scratch()).run({hidden, dtype}, {cos, dtype}, {sin, dtype}, cache, out);
}

// The same over 8-bit blocks, of one sequence, which have room for one token more.
void int4_decode_blocks(int level, int threads, int exact, const DecoderLayer* layer, const void* hidden, int dtype,
                        const void* cos, const void* sin, const KvContext* context, void* out) {
    Step(level, threads, exact != 0, *layer, scratch()).run({hidden, dtype}, {cos, dtype}, {sin, dtype}, *context, out);
}

// The first half of that step, up to attention: queries [heads, head_dim] float32, scaled; the token is appended.
void int4_decode_append(int level, int threads, int exact, const DecoderLayer* layer, const void* hidden, int dtype,
                        const void* cos, const void* sin, const KvContext* context, float* queries) {
    Scratch& buffers = scratch();
    Step(level, threads, exact != 0, *layer, buffers).append(Vector{hidden, dtype}, {cos, dtype}, {sin, dtype}, *context);
    std::copy_n(buffers.wide.data(), layer->heads * layer->head_dim, queries);
}

// The second half: mixed [heads, head_dim] float32 is what attention made of the queries.
void int4_decode_finish(int level, int threads, int exact, const DecoderLayer* layer, const void* hidden, int dtype,
                        const float* mixed, void* out) {
    Scratch& buffers = scratch();
    buffers.mixed.assign(mixed, mixed + layer->heads * layer->head_dim);
    Step(level, threads, exact != 0, *layer, buffers).finish({hidden, dtype}, out);
}
}
