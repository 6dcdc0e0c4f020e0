// A token of each of some sequences through one decoder layer, in one call: what remains of a layer's time is what its
// weights take to be read, once for all of them. Each gets the bits that it would get alone.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"

using namespace int4;

namespace {

constexpr int64_t kLargestShareBytes = 512 << 10, kSmallestShareBytes = 32 << 10;
constexpr int64_t kBatchedShareRows = 32;  // which the tiles of a batch read again and again
constexpr int64_t kShares = 4;  // of a product for each thread, so that one that is held up is not waited for

struct KeyValues {
    uint8_t *keys, *values;  // [key_heads, capacity, head_dim]
    int64_t capacity, tokens;
    int32_t dtype;

    int64_t element_bytes() const { return dtype == kFloat32 ? 4 : 2; }
};

// A sequence's next token and its past: `blocks` of 8 bits with room for one token more, or `cache` where they are null.
struct Token {
    const void *hidden, *cos, *sin;
    void* out;
    const KvContext* blocks;
    KeyValues cache;
};

// Kept between calls: a token passes through many layers of one size. Those of each token lie `width` apart.
struct Scratch {
    std::vector<float> residual, normed, wide, mixed, norm, vector, angles, sums, tops, scales, group_sums;
    std::vector<int8_t> values;
    std::vector<int32_t> centres;
    std::vector<uint8_t> workspace;
    int64_t width = 0;
};

Scratch& scratch() {
    static thread_local Scratch buffers;
    return buffers;
}

class Step {
  public:
    Step(int level, int threads, bool exact, const DecoderLayer& layer, int32_t dtype, const Token* tokens, int64_t count,
         Scratch& buffers)
        : products_(kernels(level)), lanes_(decoder_kernels(level)), level_(level), threads_(threads), exact_(exact),
          layer_(layer), dtype_(dtype), tokens_(tokens), count_(count), buffers_(buffers) {
        const int64_t qkv = (layer.heads + 2 * layer.key_heads) * layer.head_dim;
        buffers.width = std::max({qkv, 2 * layer.down.weight.inputs, layer.hidden});
        for (auto* buffer : {&buffers.residual, &buffers.normed, &buffers.wide, &buffers.mixed})
            buffer->resize(count * buffers.width);
        for (auto* buffer : {&buffers.norm, &buffers.vector}) buffer->resize(buffers.width);
    }

    void run() {
        append();
        for (int64_t m = 0; m < count_; ++m) {
            if (tokens_[m].blocks)
                attend(m, *tokens_[m].blocks);
            else
                attend(m, tokens_[m].cache);
        }
        finish();
    }

    // Up to attention: the scaled queries are left in `wide`, key and value behind the past.
    void append() {
        widen_inputs();
        normalize(layer_.input_norm);
        product(layer_.qkv, 3, buffers_.normed, buffers_.wide);
        for (int64_t m = 0; m < count_; ++m) {
            rotate(m);
            const float* keys = wide(m) + layer_.heads * layer_.head_dim;
            if (tokens_[m].blocks)
                write(keys, *tokens_[m].blocks);
            else
                write(keys, tokens_[m].cache);
        }
    }

    // After attention, whose result is in `mixed`, with the inputs in `residual`.
    void finish() {
        const int64_t mlp = layer_.down.weight.inputs;
        add_product(layer_.output);
        normalize(layer_.mlp_norm);
        product(layer_.gate_up, 2, buffers_.normed, buffers_.wide);
        each([&](int64_t m) { lanes_.gate(wide(m), wide(m) + mlp, mlp, mixed(m)); });
        add_product(layer_.down);
        each([&](int64_t m) { lanes_.narrow(residual(m), dtype_, layer_.hidden, tokens_[m].out); });
    }

    // Of the inputs the residual stream begins.
    void widen_inputs() {
        each([&](int64_t m) { lanes_.widen({tokens_[m].hidden, dtype_}, layer_.hidden, residual(m)); });
    }

  private:
    float* row(std::vector<float>& buffer, int64_t m) { return buffer.data() + m * buffers_.width; }
    float* residual(int64_t m) { return row(buffers_.residual, m); }
    float* normed(int64_t m) { return row(buffers_.normed, m); }
    float* wide(int64_t m) { return row(buffers_.wide, m); }
    float* mixed(int64_t m) { return row(buffers_.mixed, m); }

    template <class Body>
    void each(const Body& body) {
        pool().run(threads_, count_, 1, [&](int64_t begin, int64_t end) {
            for (int64_t m = begin; m < end; ++m) body(m);
        });
    }

    void normalize(const Vector& norm) {
        lanes_.widen(norm, layer_.hidden, buffers_.norm.data());
        each([&](int64_t m) {
            lanes_.normalize(residual(m), buffers_.norm.data(), layer_.hidden, layer_.norm_epsilon, normed(m));
        });
    }

    // out = x times each of the weights, one after the other, plus its bias. Those without rows come last.
    void product(const Linear* linears, int count, std::vector<float>& x, std::vector<float>& out) {
        int64_t first_row = 0;
        for (int together; count > 0 && linears->weight.rows; linears += together, count -= together) {
            together = alike(linears, count);
            const Weight& first = linears[0].weight;
            const Activations activations = exact_ ? Activations{} : quantize(first, x);
            int64_t rows = 0;
            for (int i = 0; i < together; ++i) rows += linears[i].weight.rows;
            const int64_t bytes = std::clamp(rows * first.row_bytes() / (kShares * threads_), kSmallestShareBytes,
                                             kLargestShareBytes);
            const int64_t share = bytes / (first.row_bytes() + 1) + 1;
            const Products products{out.data() + first_row, buffers_.width};
            pool().run(threads_, rows, count_ > 1 ? std::min(share, kBatchedShareRows) : share,
                       [&](int64_t begin, int64_t end) {
                           multiply(linears, together, x.data(), activations, begin, end, products);
                       });
            for (int i = 0; i < together; ++i) {
                add_bias(linears[i], out.data() + first_row);
                first_row += linears[i].weight.rows;
            }
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

    Activations quantize(const Weight& w, std::vector<float>& x) {
        const int64_t steps = w.steps(), sums = steps * kSums;
        buffers_.values.resize(count_ * steps * kStep);
        buffers_.scales.resize(count_ * sums);
        buffers_.centres.resize(count_ * sums);
        buffers_.group_sums.resize(count_ * w.groups());
        const Activations a{buffers_.values.data(), buffers_.scales.data(), buffers_.centres.data(),
                            buffers_.group_sums.data()};
        each([&](int64_t m) {
            products_.quantize(w, row(x, m), {a.values + m * steps * kStep, a.scale + m * sums, a.centre + m * sums,
                                              a.group_sum + m * w.groups()});
        });
        return a;
    }

    void multiply(const Linear* linears, int count, const float* x, const Activations& activations, int64_t begin,
                  int64_t end, Products out) const {
        for (int i = 0; i < count && end > 0; ++i) {
            const Weight& w = linears[i].weight;
            const int64_t last = std::min(end, w.rows);
            if (begin < last) {
                if (exact_)
                    products_.exact(w, x, buffers_.width, count_, nullptr, out, begin, last);
                else
                    products_.fast(w, activations, count_, nullptr, out, begin, last);
            }
            begin = std::max<int64_t>(begin - w.rows, 0);
            end -= w.rows;
            out.data += w.rows;
        }
    }

    void add_bias(const Linear& linear, float* out) {
        if (!linear.bias.data) return;
        lanes_.widen(linear.bias, linear.weight.rows, buffers_.vector.data());
        for (int64_t m = 0; m < count_; ++m)
            for (int64_t i = 0; i < linear.weight.rows; ++i) out[m * buffers_.width + i] += buffers_.vector[i];
    }

    // Add to the residual stream what a weight makes of `mixed`.
    void add_product(const Linear& linear) {
        product(&linear, 1, buffers_.mixed, buffers_.normed);
        for (int64_t m = 0; m < count_; ++m)
            for (int64_t i = 0; i < layer_.hidden; ++i) residual(m)[i] += normed(m)[i];
    }

    // Norms of heads, where there are some, then positions as rotations (arXiv:2104.09864), the halves of a head paired.
    void rotate(int64_t m) {
        const int64_t dim = layer_.head_dim, half = layer_.rotary / 2;
        float* qkv = wide(m);
        buffers_.angles.resize(2 * layer_.rotary);
        float *cosines = buffers_.angles.data(), *sines = cosines + layer_.rotary;
        lanes_.widen({tokens_[m].cos, dtype_}, layer_.rotary, cosines);
        lanes_.widen({tokens_[m].sin, dtype_}, layer_.rotary, sines);
        for (int64_t h = 0; h < layer_.heads + layer_.key_heads; ++h) {
            float* x = qkv + h * dim;
            const Vector& norm = h < layer_.heads ? layer_.query_norm : layer_.key_norm;
            if (norm.data) {
                lanes_.widen(norm, dim, buffers_.norm.data());
                lanes_.normalize(x, buffers_.norm.data(), dim, layer_.norm_epsilon, x);
            }
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

    void attend(int64_t m, const KvContext& past) {
        AttentionJob job{past, {wide(m), kFloat32, {0, layer_.head_dim, 0}}, layer_.heads, 1, 1.0f, nullptr, 0};
        ++job.context.tokens;
        buffers_.workspace.resize(attention_workspace_bytes(past.shape, layer_.heads, 1, job.context.tokens));
        attend_pieces(level_, threads_, job, 0, job.context.tokens, buffers_.workspace.data());
        merge_pieces(level_, job, buffers_.workspace.data(), kFloat32, mixed(m));
    }

    // Attention by pieces of the context, merged in order: the result does not depend on the number of threads.
    void attend(int64_t m, const KeyValues& cache) {
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
                const AttentionHead head{wide(m) + h * group * dim, cache.keys + start, cache.values + start,
                                         group, dim, cache.dtype};
                lanes_.attend(head, p * kContextPiece, std::min((p + 1) * kContextPiece, tokens), part(h, p));
            }
        });
        for (int64_t h = 0; h < layer_.key_heads; ++h)
            for (int64_t g = 0; g < group; ++g) merge(h, g, pieces, part, mixed(m) + (h * group + g) * dim);
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
    const int32_t dtype_;
    const Token* const tokens_;
    const int64_t count_;
    Scratch& buffers_;
};

}  // namespace

extern "C" {

// Bytes of the layer's description, as the caller lays it out.
int64_t int4_decoder_layer_bytes() { return sizeof(DecoderLayer); }

int64_t int4_decoder_token_bytes() { return sizeof(Token); }

// For each token: out [hidden] = the layer's output, of `dtype` as hidden, cos and sin [rotary] are; its key and value are
// appended to its past.
void int4_decode(int level, int threads, int exact, const DecoderLayer* layer, int dtype, const Token* tokens,
                 int64_t count) {
    Step(level, threads, exact != 0, *layer, dtype, tokens, count, scratch()).run();
}

// The first half of that for one token, up to attention: queries [heads, head_dim] float32, scaled.
void int4_decode_append(int level, int threads, int exact, const DecoderLayer* layer, int dtype, const Token* token,
                        float* queries) {
    Scratch& buffers = scratch();
    Step(level, threads, exact != 0, *layer, dtype, token, 1, buffers).append();
    std::copy_n(buffers.wide.data(), layer->heads * layer->head_dim, queries);
}

// The second half: mixed [heads, head_dim] float32 is what attention made of the queries.
void int4_decode_finish(int level, int threads, int exact, const DecoderLayer* layer, int dtype, const Token* token,
                        const float* mixed) {
    Scratch& buffers = scratch();
    Step step(level, threads, exact != 0, *layer, dtype, token, 1, buffers);
    std::copy_n(mixed, layer->heads * layer->head_dim, buffers.mixed.data());
    step.widen_inputs();
    step.finish();
}
}
