// The two products of attention with AVX2; included by avx2.cpp after attention_lanes.h.

// The sums of the lanes of 8 vectors, as one vector.
inline __m256i sum_each(const __m256i* v) {
    const auto fours = [](const __m256i* w) {
        return _mm256_hadd_epi32(_mm256_hadd_epi32(w[0], w[1]), _mm256_hadd_epi32(w[2], w[3]));
    };
    const __m256i first = fours(v), second = fours(v + 4);
    return _mm256_add_epi32(_mm256_permute2x128_si256(first, second, 0x20), _mm256_permute2x128_si256(first, second, 0x31));
}

struct Avx2Lanes {
    // NaN if there is one, which a maximum of vectors may drop.
    static float largest(const float* x) {
        __m256 found = _mm256_set1_ps(-__builtin_inff()), bad = _mm256_setzero_ps();
        for (int64_t t = 0; t < int4::kContextPiece; t += 8) {
            const __m256 next = _mm256_loadu_ps(x + t);
            found = _mm256_max_ps(next, found);
            bad = _mm256_or_ps(bad, _mm256_cmp_ps(next, next, _CMP_UNORD_Q));
        }
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, found);
        float top = lanes[0];
        for (int i = 1; i < 8; ++i) top = lanes[i] > top ? lanes[i] : top;
        return _mm256_movemask_ps(bad) ? __builtin_nanf("") : top;
    }

    // 16 elements at a time: what is read past a key is multiplied by the zeros that pad the query.
    static void dots(const int4::Queries& query, const int8_t* keys, int64_t dim, int32_t* out) {
        for (int64_t t = 0; t < int4::kTileTokens; t += 8) {
            __m256i sums[8];
            for (int64_t half = 0; half < 8; half += 4) dots_of_four(query.whole, keys + (t + half) * dim, dim, sums + half);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + t), sum_each(sums));
        }
    }

    static void dots_of_four(const int16_t* query, const int8_t* keys, int64_t dim, __m256i* sums) {
        __m256i sum[4] = {};
        for (int64_t d = 0; d < dim; d += 16) {
            const __m256i whole = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + d));
            for (int i = 0; i < 4; ++i) {
                const __m128i key = _mm_loadu_si128(reinterpret_cast<const __m128i*>(keys + i * dim + d));
                sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(whole, _mm256_cvtepi8_epi16(key)));
            }
        }
        for (int i = 0; i < 4; ++i) sums[i] = sum[i];
    }

    static void add_values(const int4::Piece& p, const float* weights, float* sum) {
        for (int64_t q = 0; q < p.count; q += 4) {
            const int64_t together = p.count - q < 4 ? p.count - q : 4;
            const float* of_queries = weights + q * int4::kContextPiece;
            float* out = sum + q * p.value_dim;
            together == 4   ? add_rows<4>(p, of_queries, out)
            : together == 3 ? add_rows<3>(p, of_queries, out)
            : together == 2 ? add_rows<2>(p, of_queries, out)
                            : add_rows<1>(p, of_queries, out);
        }
    }

    // The values of all tokens, by the weights of Q queries.
    template <int Q>
    static void add_rows(const int4::Piece& p, const float* weights, float* out) {
        int64_t d = 0;
        for (; d + 16 <= p.value_dim; d += 16) add_columns<Q>(p, weights, d, out + d);
        for (; d < p.value_dim; ++d)
            for (int q = 0; q < Q; ++q) {
                float total = 0;
                for (int64_t t = 0; t < p.tokens; ++t)
                    total = __builtin_fmaf(weights[q * int4::kContextPiece + t], float(row_of(p, t)[d]), total);
                out[q * p.value_dim + d] = total;
            }
    }

    static const int8_t* row_of(const int4::Piece& p, int64_t t) {
        return p.blocks[t / int4::kBlockTokens].values + t % int4::kBlockTokens * p.value_dim;
    }

    // 16 elements of the values from `first` on, which stay in registers for all tokens.
    template <int Q>
    static void add_columns(const int4::Piece& p, const float* weights, int64_t first, float* out) {
        __m256 total[Q][2];
        for (int q = 0; q < Q; ++q) total[q][0] = total[q][1] = _mm256_setzero_ps();
        for (int64_t start = 0; start < p.tokens; start += int4::kBlockTokens) {
            const int64_t count = p.tokens - start < int4::kBlockTokens ? p.tokens - start : int4::kBlockTokens;
            const int8_t* codes = row_of(p, start) + first;
            for (int64_t t = start; t < start + count; ++t, codes += p.value_dim) {
                const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
                const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
                const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
                for (int q = 0; q < Q; ++q) {
                    const __m256 weight = _mm256_broadcast_ss(weights + q * int4::kContextPiece + t);
                    total[q][0] = _mm256_fmadd_ps(weight, low, total[q][0]);
                    total[q][1] = _mm256_fmadd_ps(weight, high, total[q][1]);
                }
            }
        }
        for (int q = 0; q < Q; ++q)
            for (int h = 0; h < 2; ++h) _mm256_storeu_ps(out + q * p.value_dim + 8 * h, total[q][h]);
    }
};
