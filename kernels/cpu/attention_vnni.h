// The two integer products of attention with AVX512-VNNI; included by avx512.cpp after attention_lanes.h.

// The sums of the lanes of 16 vectors, as one vector.
inline __m512i sum_each(const __m512i* v) {
    __m512i pairs[8], fours[4];
    for (int i = 0; i < 8; ++i)
        pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]),
                                    _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; ++i)
        fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]),
                                    _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
    const auto halves = [](__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    };
    return halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
}

// Of [kContextPiece]; NaN if there is one, which a maximum of vectors may drop.
inline float largest_of(const float* x) {
    __m512 found = _mm512_set1_ps(-__builtin_inff());
    __mmask16 bad = 0;
    for (int64_t t = 0; t < int4::kContextPiece; t += 16) {
        const __m512 next = _mm512_loadu_ps(x + t);
        found = _mm512_max_ps(next, found);
        bad |= _mm512_cmp_ps_mask(next, next, _CMP_UNORD_Q);
    }
    return bad ? __builtin_nanf("") : _mm512_reduce_max_ps(found);
}

// Weights of value codes in 16 bits under one unit, as a high and a low byte; for 4 tokens side by side.
struct ByteWeights {
    alignas(64) uint8_t high[int4::kContextPiece];
    alignas(64) uint8_t low[int4::kContextPiece];
    float unit;

    // weights: [kContextPiece], 0 for tokens that are not there.
    void set(const float* weights) {
        const float top = largest_of(weights);
        const __m512 inverse = _mm512_set1_ps(top > 1e-30f ? 65535.0f / top : 0.0f);
        unit = top / 65535.0f;
        for (int64_t t = 0; t < int4::kContextPiece; t += 16) {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(weights + t), inverse));
            const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8));
            _mm_store_si128(reinterpret_cast<__m128i*>(high + t), bytes);
            _mm_store_si128(reinterpret_cast<__m128i*>(low + t), _mm512_cvtepi32_epi8(whole));
        }
    }

    static __m512i four(const uint8_t* bytes) {
        int32_t tokens;
        __builtin_memcpy(&tokens, bytes, 4);
        return _mm512_set1_epi32(tokens);
    }
};

struct VnniLanes {
    static float largest(const float* x) { return largest_of(x); }

    // Keys are made unsigned by adding 128, which adds 128 times the sum of the query.
    static void dots(const int4::Queries& query, const int8_t* keys, int64_t dim, int32_t* out) {
        dim == 64 ? dots_of<1>(query, keys, dim, out) : dim == 128 ? dots_of<2>(query, keys, dim, out)
                                                                   : dots_of<0>(query, keys, dim, out);
    }

    // Steps: of 64 elements, where they are few enough for the query to stay in registers; 0 for any number.
    template <int Steps>
    static void dots_of(const int4::Queries& query, const int8_t* keys, int64_t dim, int32_t* out) {
        const __m512i flip = _mm512_set1_epi8(-128);
        const int64_t end = Steps ? Steps * 64 : dim;
        __m512i sums[int4::kTileTokens];
        for (int64_t t = 0; t < int4::kTileTokens; ++t, keys += dim) {
            __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
            for (int64_t d = 0; d < end; d += 64) {
                const __m512i key = _mm512_xor_si512(_mm512_loadu_si512(keys + d), flip);
                high = _mm512_dpbusd_epi32(high, key, _mm512_loadu_si512(query.high + d));
                low = _mm512_dpbusd_epi32(low, key, _mm512_loadu_si512(query.low + d));
            }
            sums[t] = _mm512_add_epi32(_mm512_slli_epi32(high, int4::kLowBits), low);
        }
        _mm512_storeu_si512(out, _mm512_sub_epi32(sum_each(sums), _mm512_set1_epi32(128 * *query.sum)));
    }

    static void add_values(const int4::Piece& p, const float* weights, float* sum) {
        ByteWeights pair[2];
        for (int64_t q = 0; q < p.count; q += 2) {
            const int64_t together = p.count - q < 2 ? 1 : 2;
            for (int64_t i = 0; i < together; ++i) pair[i].set(weights + (q + i) * int4::kContextPiece);
            for (int64_t d = 0; d < p.value_dim; d += 64) {
                float* out = sum + q * p.value_dim + d;
                together == 2 ? add_columns<2>(p, pair, d, out) : add_columns<1>(p, pair, d, out);
            }
        }
    }

    // 64 elements of the values from `first` on, for one or two queries.
    template <int Q>
    static void add_columns(const int4::Piece& p, const ByteWeights* weights, int64_t first, float* out) {
        __m512i high[Q][4], low[Q][4];
        for (int q = 0; q < Q; ++q)
            for (int i = 0; i < 4; ++i) high[q][i] = low[q][i] = _mm512_setzero_si512();
        for (int64_t t = 0; t < p.tokens; t += 4) {
            const int4::BlockRows& block = p.blocks[t / int4::kBlockTokens];
            __m512i codes[4];
            interleave(block.values + t % int4::kBlockTokens * p.value_dim + first, p.value_dim, codes);
            for (int q = 0; q < Q; ++q) {
                const __m512i by_high = ByteWeights::four(weights[q].high + t);
                const __m512i by_low = ByteWeights::four(weights[q].low + t);
                for (int i = 0; i < 4; ++i) {
                    high[q][i] = _mm512_dpbusd_epi32(high[q][i], by_high, codes[i]);
                    low[q][i] = _mm512_dpbusd_epi32(low[q][i], by_low, codes[i]);
                }
            }
        }
        for (int q = 0; q < Q; ++q) store(high[q], low[q], weights[q].unit, p.value_dim - first, out + q * p.value_dim);
    }

    // Four rows of 64 codes, four tokens of an element side by side: vector i has elements 4i..4i+3 of each 16.
    static void interleave(const int8_t* rows, int64_t stride, __m512i* out) {
        const __m512i a = _mm512_loadu_si512(rows), b = _mm512_loadu_si512(rows + stride);
        const __m512i c = _mm512_loadu_si512(rows + 2 * stride), d = _mm512_loadu_si512(rows + 3 * stride);
        const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
        const __m512i ab_far = _mm512_unpackhi_epi8(a, b), cd_far = _mm512_unpackhi_epi8(c, d);
        out[0] = _mm512_unpacklo_epi16(ab, cd);
        out[1] = _mm512_unpackhi_epi16(ab, cd);
        out[2] = _mm512_unpacklo_epi16(ab_far, cd_far);
        out[3] = _mm512_unpackhi_epi16(ab_far, cd_far);
    }

    static void store(const __m512i* high, const __m512i* low, float unit, int64_t count, float* out) {
        alignas(64) float lanes[4][16];
        for (int i = 0; i < 4; ++i) {
            const __m512 wide = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[i]), _mm512_set1_ps(256), _mm512_cvtepi32_ps(low[i]));
            _mm512_store_ps(lanes[i], _mm512_mul_ps(wide, _mm512_set1_ps(unit)));
        }
        for (int64_t e = 0; e < count && e < 64; ++e) out[e] = lanes[e % 16 / 4][e / 16 * 4 + e % 4];
    }
};
