// Attention over keys and values in 8 bits, in blocks as kernels/kv_block.py lays them out.
#pragma once
#include "decoder.h"

namespace int4 {

constexpr int64_t kBlockTokens = 64;
constexpr int64_t kTileTokens = 16;  // tokens that are multiplied by a query together
constexpr int64_t kPieceBlocks = kContextPiece / kBlockTokens;

// A query has 15 bits, as a high and a low byte: its error is far below that of the keys.
constexpr int32_t kLowBits = 7, kQueryMax = 127 << kLowBits;
constexpr int64_t kQueryPadding = 64;

struct BlockShape {
    int64_t batch, key_heads, key_dim, value_dim;

    int64_t rows() const { return batch * key_heads * kBlockTokens; }
};

// Keys and values of one sequence and one head in a block, token by token.
struct BlockRows {
    int8_t *keys, *values;              // [kBlockTokens, key_dim], [kBlockTokens, value_dim]
    uint16_t *key_scale, *value_scale;  // [kBlockTokens], bf16

    BlockRows() = default;
    BlockRows(const BlockShape& shape, uint8_t* block, int64_t head) {
        const int64_t first = head * kBlockTokens, rows = shape.rows();
        int8_t* codes = reinterpret_cast<int8_t*>(block);
        uint16_t* scales = reinterpret_cast<uint16_t*>(block + rows * (shape.key_dim + shape.value_dim));
        keys = codes + first * shape.key_dim;
        values = codes + rows * shape.key_dim + first * shape.value_dim;
        key_scale = scales + first;
        value_scale = scales + rows + first;
    }
};

// Queries as integers: x = unit * whole, whole = high * 2^kLowBits + low. Rows are padded with zeros to `padded`.
struct Queries {
    int16_t* whole;
    int8_t *high, *low;
    int32_t* sum;  // of `whole`
    float* unit;
    int64_t padded;

    Queries from(int64_t row) const {
        return {whole + row * padded, high + row * padded, low + row * padded, sum + row, unit + row, padded};
    }
};

// A piece of the context of one sequence and key head, and the queries that share it.
struct Piece {
    BlockRows blocks[kPieceBlocks];
    int64_t tokens, key_dim, value_dim;
    Queries queries;
    int64_t count;           // of queries
    const int64_t* visible;  // [count], how many of the piece's tokens each may see
    const uint8_t* const* masks;  // [count], null, or one byte a token: 0 where it may not look; or null for none
};

struct AttentionKernels {
    void (*quantize)(const float* x, int64_t count, int8_t* codes, uint16_t* scale);
    void (*prepare)(const float* x, int64_t count, const Queries& out);
    void (*attend)(const Piece&, const AttentionPart& out);
};

extern const AttentionKernels portable_attention;
#if defined(__x86_64__)
extern const AttentionKernels avx2_attention;
extern const AttentionKernels avx512_attention;
#endif

// The first `tokens` tokens in a row of blocks.
struct KvContext {
    BlockShape shape;
    uint8_t* const* blocks;
    int64_t tokens;
    const float* key_offset;  // [key_heads, key_dim] or null
};

// Rows of floats of some dtype, [batch, heads, tokens, dim] with the strides of the first three, in elements.
struct Rows {
    const void* data;
    int32_t dtype;
    int64_t strides[3];

    Vector row(int64_t b, int64_t h, int64_t n) const {
        const int64_t at = b * strides[0] + h * strides[1] + n * strides[2];
        return {static_cast<const uint8_t*>(data) + at * (dtype == kFloat32 ? 4 : 2), dtype};
    }
};

// Queries of the last `count` tokens of the context, and what they leave behind for each piece of it.
struct AttentionJob {
    KvContext context;
    Rows queries;
    int64_t heads, count;
    float scaling;
    const uint8_t* mask;  // [batch or 1, count, tokens], or null: a query then sees the tokens up to its own
    int64_t mask_stride;  // from sequence to sequence
};

int64_t attention_workspace_bytes(const BlockShape&, int64_t heads, int64_t count, int64_t tokens);
void append_tokens(int level, int threads, const KvContext&, const Rows& keys, const Rows& values, int64_t count);
void attend_pieces(int level, int threads, const AttentionJob&, int64_t first, int64_t last, void* workspace);
void merge_pieces(int level, const AttentionJob&, const void* workspace, int32_t dtype, void* out);

}  // namespace int4
