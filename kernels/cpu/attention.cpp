// Attention over 8-bit keys and values: pieces of the context by threads, merged in order, so that the result depends
// neither on their number nor on which pieces lie in memory together.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"

namespace int4 {

namespace {

const AttentionKernels& attention_kernels(int level) {
#if defined(__x86_64__)
    if (level >= 2) return avx512_attention;
    if (level == 1) return avx2_attention;
#endif
    (void)level;
    return portable_attention;
}

int64_t pieces_of(int64_t tokens) { return (tokens + kContextPiece - 1) / kContextPiece; }

// What queries leave behind: for each sequence, key head and piece, the parts of the queries that share the head.
struct Parts {
    float *sums, *tops, *weights;
    int64_t pieces, sharing, dim;

    Parts(const AttentionJob& job, void* workspace)
        : pieces(pieces_of(job.context.tokens)), sharing(job.heads / job.context.shape.key_heads * job.count),
          dim(job.context.shape.value_dim) {
        const int64_t count = job.context.shape.batch * job.context.shape.key_heads * pieces * sharing;
        tops = static_cast<float*>(workspace);
        weights = tops + count;
        sums = weights + count;
    }

    AttentionPart at(int64_t head, int64_t piece) const {
        const int64_t first = (head * pieces + piece) * sharing;
        return {sums + first * dim, tops + first, weights + first};
    }
};

// Queries as integers, those that share a key head side by side: [batch, key_heads, group, count].
class PreparedQueries {
  public:
    PreparedQueries(int level, const AttentionJob& job) {
        const BlockShape& shape = job.context.shape;
        const int64_t rows = shape.batch * job.heads * job.count;
        const int64_t padded = (shape.key_dim + kQueryPadding - 1) / kQueryPadding * kQueryPadding;
        whole_.resize(rows * padded), high_.resize(rows * padded), low_.resize(rows * padded);
        sum_.resize(rows), unit_.resize(rows);
        queries_ = {whole_.data(), high_.data(), low_.data(), sum_.data(), unit_.data(), padded};
        std::vector<float> wide(shape.key_dim);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t n = row % job.count, head = row / job.count;
            decoder_kernels(level).widen(job.queries.row(head / job.heads, head % job.heads, n), shape.key_dim, wide.data());
            for (float& x : wide) x *= job.scaling;
            attention_kernels(level).prepare(wide.data(), shape.key_dim, queries_.from(row));
        }
    }

    Queries from(int64_t row) const { return queries_.from(row); }

  private:
    std::vector<int16_t> whole_;
    std::vector<int8_t> high_, low_;
    std::vector<int32_t> sum_;
    std::vector<float> unit_;
    Queries queries_;
};

void attend_one(int level, const AttentionJob& job, const PreparedQueries& prepared, const Parts& parts, int64_t head,
                int64_t index) {
    const BlockShape& shape = job.context.shape;
    const int64_t start = index * kContextPiece, tokens = job.context.tokens;
    std::vector<int64_t> visible(parts.sharing);
    std::vector<const uint8_t*> masks(parts.sharing);
    Piece piece{};
    piece.tokens = std::min(kContextPiece, tokens - start);
    for (int64_t j = 0; j * kBlockTokens < piece.tokens; ++j)
        piece.blocks[j] = BlockRows(shape, job.context.blocks[index * kPieceBlocks + j], head);
    for (int64_t i = 0; i < parts.sharing; ++i) {
        const int64_t n = i % job.count;
        visible[i] = std::min(piece.tokens, job.mask ? piece.tokens : tokens - job.count + n + 1 - start);
        if (job.mask) masks[i] = job.mask + head / shape.key_heads * job.mask_stride + n * tokens + start;
    }
    piece.key_dim = shape.key_dim;
    piece.value_dim = shape.value_dim;
    piece.queries = prepared.from(head * parts.sharing);
    piece.count = parts.sharing;
    piece.visible = visible.data();
    piece.masks = job.mask ? masks.data() : nullptr;
    attention_kernels(level).attend(piece, parts.at(head, index));
}

// The parts of one query, weighed against each other; of a query that may look nowhere, zeros.
void merge_one(const Parts& parts, int64_t head, int64_t query, float* out) {
    const auto part = [&](int64_t p) { return parts.at(head, p); };
    float top = -INFINITY, weight = 0;
    for (int64_t p = 0; p < parts.pieces; ++p) {
        const float candidate = part(p).top[query];
        top = candidate > top || candidate != candidate ? candidate : top;
    }
    std::fill(out, out + parts.dim, 0.0f);
    if (top == -INFINITY) return;
    for (int64_t p = 0; p < parts.pieces; ++p) {
        const float share = std::exp(part(p).top[query] - top);
        weight += share * part(p).weight[query];
        for (int64_t d = 0; d < parts.dim; ++d) out[d] += share * part(p).sum[query * parts.dim + d];
    }
    for (int64_t d = 0; d < parts.dim; ++d) out[d] /= weight;
}

}  // namespace

int64_t attention_workspace_bytes(const BlockShape& shape, int64_t heads, int64_t count, int64_t tokens) {
    return shape.batch * heads * count * pieces_of(tokens) * (shape.value_dim + 2) * int64_t(sizeof(float));
}

// Quantise `count` new tokens behind those of the context.
void append_tokens(int level, int threads, const KvContext& context, const Rows& keys, const Rows& values,
                   int64_t count) {
    constexpr int64_t kGrainRows = 64;
    const BlockShape& shape = context.shape;
    const AttentionKernels& kernels = attention_kernels(level);
    const DecoderKernels& decoder = decoder_kernels(level);
    pool().run(threads, shape.batch * shape.key_heads * count, kGrainRows, [&](int64_t begin, int64_t end) {
        std::vector<float> wide(std::max(shape.key_dim, shape.value_dim));
        for (int64_t i = begin; i < end; ++i) {
            const int64_t n = i % count, head = i / count, token = context.tokens + n;
            const int64_t b = head / shape.key_heads, h = head % shape.key_heads, at = token % kBlockTokens;
            const BlockRows rows(shape, context.blocks[token / kBlockTokens], head);
            decoder.widen(keys.row(b, h, n), shape.key_dim, wide.data());
            for (int64_t d = 0; context.key_offset && d < shape.key_dim; ++d)
                wide[d] -= context.key_offset[h * shape.key_dim + d];
            kernels.quantize(wide.data(), shape.key_dim, rows.keys + at * shape.key_dim, rows.key_scale + at);
            decoder.widen(values.row(b, h, n), shape.value_dim, wide.data());
            kernels.quantize(wide.data(), shape.value_dim, rows.values + at * shape.value_dim, rows.value_scale + at);
        }
    });
}

// Attend to the tokens first..last, both multiples of kContextPiece unless `last` is the end of the context.
void attend_pieces(int level, int threads, const AttentionJob& job, int64_t first, int64_t last, void* workspace) {
    const PreparedQueries prepared(level, job);
    const Parts parts(job, workspace);
    const int64_t from = first / kContextPiece, pieces = pieces_of(last) - from;
    pool().run(threads, job.context.shape.batch * job.context.shape.key_heads * pieces, 1,
               [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i)
                       attend_one(level, job, prepared, parts, i / pieces, from + i % pieces);
               });
}

// out [batch, count, heads, value_dim] of `dtype`, once every piece has been attended to.
void merge_pieces(int level, const AttentionJob& job, const void* workspace, int32_t dtype, void* out) {
    const BlockShape& shape = job.context.shape;
    const Parts parts(job, const_cast<void*>(workspace));
    const int64_t group = job.heads / shape.key_heads, row_bytes = shape.value_dim * (dtype == kFloat32 ? 4 : 2);
    std::vector<float> merged(shape.value_dim);
    for (int64_t head = 0; head < shape.batch * shape.key_heads; ++head)
        for (int64_t query = 0; query < parts.sharing; ++query) {
            const int64_t g = query / job.count, n = query % job.count, b = head / shape.key_heads;
            const int64_t row = (b * job.count + n) * job.heads + head % shape.key_heads * group + g;
            merge_one(parts, head, query, merged.data());
            decoder_kernels(level).narrow(merged.data(), dtype, shape.value_dim, static_cast<uint8_t*>(out) + row * row_bytes);
        }
}

}  // namespace int4

using namespace int4;

extern "C" {

// Bytes of the descriptions, as the caller lays them out.
int64_t int4_kv_context_bytes() { return sizeof(KvContext); }
int64_t int4_kv_job_bytes() { return sizeof(AttentionJob); }

int64_t int4_kv_workspace_bytes(const AttentionJob* job) {
    return attention_workspace_bytes(job->context.shape, job->heads, job->count, job->context.tokens);
}

void int4_kv_append(int level, int threads, const KvContext* context, const Rows* keys, const Rows* values,
                    int64_t count) {
    append_tokens(level, threads, *context, *keys, *values, count);
}

void int4_kv_attend(int level, int threads, const AttentionJob* job, int64_t first, int64_t last, void* workspace) {
    attend_pieces(level, threads, *job, first, last, workspace);
}

void int4_kv_merge(int level, const AttentionJob* job, const void* workspace, int dtype, void* out) {
    merge_pieces(level, *job, workspace, dtype, out);
}
}
