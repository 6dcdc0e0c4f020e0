// Attention over one piece of the context, for every instruction set; included after lanes.h in its unnamed namespace.
//
// `Lanes` supplies
//   dots(queries, keys, dim, out)        integer products of one query with kTileTokens keys, [16, dim]
//   largest(x)                           of [kContextPiece]; NaN if there is one
//   add_values(piece, weights, sum)      sum [count, value_dim] = weights [count, kContextPiece] times the value codes

// In lanes, which compilers keep in a register; a plain loop waits for each addition. count: a multiple of kLanes.
inline float sum_of(const float* x, int64_t count) {
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < count; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
    for (int64_t half = kLanes / 2; half; half /= 2)
        for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    return lanes[0];
}

// Round a row to signed bytes under one bf16 scale, bit for bit as kernels/kv_block.py does.
void quantize_row(const float* x, int64_t count, int8_t* codes, uint16_t* scale) {
    float top = 0, bad = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float magnitude = __builtin_fabsf(x[i]);
        top = magnitude > top ? magnitude : top;
        bad += x[i] * 0.0f;
    }
    *scale = bad == 0 ? float_to_bf16(top / 127.0f) : 0x7fc0;
    const float step = bf16_to_float(*scale);
    for (int64_t i = 0; i < count; ++i) {
        const float code = step > 0 ? __builtin_rintf(x[i] / step) : 0.0f;
        codes[i] = int8_t(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code);
    }
}

void prepare_query(const float* x, int64_t count, const int4::Queries& out) {
    float top = 0, bad = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float magnitude = __builtin_fabsf(x[i]);
        top = magnitude > top ? magnitude : top;
        bad += x[i] * 0.0f;
    }
    const float inverse = bad == 0 && top > 1e-30f ? float(int4::kQueryMax) / top : 0.0f;
    *out.unit = top / float(int4::kQueryMax) + bad;
    int32_t sum = 0;
    for (int64_t i = 0; i < out.padded; ++i) {
        const int32_t whole = inverse > 0 && i < count ? int32_t(__builtin_rintf(x[i] * inverse)) : 0;
        const int32_t high = (whole + (1 << (int4::kLowBits - 1))) >> int4::kLowBits;
        out.whole[i] = int16_t(whole);
        out.high[i] = int8_t(high);
        out.low[i] = int8_t(whole - high * (1 << int4::kLowBits));
        sum += whole;
    }
    *out.sum = sum;
}

template <class Lanes>
void score(const int4::Piece& p, float* scores) {
    int32_t dots[int4::kTileTokens];
    float scales[int4::kTileTokens];
    for (int64_t t = 0; t < p.tokens; t += int4::kTileTokens) {
        const int4::BlockRows& block = p.blocks[t / int4::kBlockTokens];
        const int64_t first = t % int4::kBlockTokens;
        for (int64_t i = 0; i < int4::kTileTokens; ++i) scales[i] = bf16_to_float(block.key_scale[first + i]);
        for (int64_t q = 0; q < p.count; ++q) {
            const int4::Queries query = p.queries.from(q);
            Lanes::dots(query, block.keys + first * p.key_dim, p.key_dim, dots);
            float* out = scores + q * int4::kContextPiece + t;
            for (int64_t i = 0; i < int4::kTileTokens; ++i) out[i] = float(dots[i]) * (*query.unit * scales[i]);
        }
    }
}

// Scores become weights of value codes; those of tokens that are not there, or not to be seen, are 0.
template <class Lanes>
void weigh_codes(const int4::Piece& p, int64_t q, float* __restrict scores, float* top, float* weight) {
    const int64_t visible = p.visible[q];
    const uint8_t* mask = p.masks ? p.masks[q] : nullptr;
    for (int64_t t = 0; mask && t < visible; ++t) scores[t] = mask[t] ? scores[t] : -__builtin_inff();
    for (int64_t t = visible > 0 ? visible : 0; t < int4::kContextPiece; ++t) scores[t] = -__builtin_inff();
    const float largest = Lanes::largest(scores);
    const float base = largest == -__builtin_inff() ? 0.0f : largest;
    for (int64_t t = 0; t < int4::kContextPiece; ++t) scores[t] = exponential(scores[t] - base);
    *weight = sum_of(scores, int4::kContextPiece);
    *top = largest;
    for (int64_t t = 0; t < p.tokens; t += int4::kBlockTokens) {
        const uint16_t* __restrict scales = p.blocks[t / int4::kBlockTokens].value_scale;
        float* __restrict weights = scores + t;
        for (int64_t i = 0; i < int4::kBlockTokens; ++i)
            weights[i] = weights[i] == 0 ? 0.0f : weights[i] * bf16_to_float(scales[i]);
    }
}

template <class Lanes>
void attend_piece(const int4::Piece& p, const int4::AttentionPart& out) {
    float* scores = new float[p.count * int4::kContextPiece];
    score<Lanes>(p, scores);
    for (int64_t q = 0; q < p.count; ++q) weigh_codes<Lanes>(p, q, scores + q * int4::kContextPiece, out.top + q, out.weight + q);
    Lanes::add_values(p, scores, out.sum);
    delete[] scores;
}

// Loops that compilers turn into lanes.
struct PlainLanes {
    static void dots(const int4::Queries& query, const int8_t* keys, int64_t dim, int32_t* out) {
        for (int64_t t = 0; t < int4::kTileTokens; ++t, keys += dim) {
            int32_t sum = 0;
            for (int64_t d = 0; d < dim; ++d) sum += int32_t(query.whole[d]) * int32_t(keys[d]);
            out[t] = sum;
        }
    }

    static float largest(const float* x) {
        float found = x[0];
        for (int64_t t = 1; t < int4::kContextPiece; ++t) found = x[t] > found || x[t] != x[t] ? x[t] : found;
        return found;
    }

    static void add_values(const int4::Piece& p, const float* weights, float* sum) {
        float* wide = new float[p.value_dim];
        for (int64_t i = 0; i < p.count * p.value_dim; ++i) sum[i] = 0;
        for (int64_t t = 0; t < p.tokens; ++t) {
            const int8_t* codes =
                p.blocks[t / int4::kBlockTokens].values + t % int4::kBlockTokens * p.value_dim;
            for (int64_t d = 0; d < p.value_dim; ++d) wide[d] = float(codes[d]);
            for (int64_t q = 0; q < p.count; ++q) {
                const float weight = weights[q * int4::kContextPiece + t];
                float* __restrict total = sum + q * p.value_dim;
                for (int64_t d = 0; d < p.value_dim; ++d) total[d] += weight * wide[d];
            }
        }
        delete[] wide;
    }
};
