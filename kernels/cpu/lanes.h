// The parts of a decoder layer that are no product of weights, in loops that every compiler turns into lanes.
//
// Included after rows.h, inside the unnamed namespace of each instruction set.

inline float bits_to_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

// Round to the nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = float_to_bits(value);
    return uint16_t(value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t float_to_fp16(float value) {
    const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000;
    const float magnitude = __builtin_fabsf(value);
    if (value != value) return uint16_t(sign | 0x7e00);
    if (magnitude >= 65520.0f) return uint16_t(sign | 0x7c00);
    if (magnitude < 6.103515625e-5f)  // subnormal: a multiple of 2^-24
        return uint16_t(sign | uint32_t(__builtin_rintf(magnitude * 16777216.0f)));
    const uint32_t kept = float_to_bits(magnitude) - 0x38000000u;
    return uint16_t(sign | ((kept + 0x0fff + ((kept >> 13) & 1)) >> 13));
}

// `count` floats of some dtype, read or written one by one.
template <int D>
inline float read_at(const void* data, int64_t i) {
    if constexpr (D == int4::kFloat32) return static_cast<const float*>(data)[i];
    if constexpr (D == int4::kBfloat16) return bits_to_float(uint32_t(static_cast<const uint16_t*>(data)[i]) << 16);
    return fp16_to_float(static_cast<const uint16_t*>(data)[i]);
}

template <int D>
inline void write_at(float value, void* data, int64_t i) {
    if constexpr (D == int4::kFloat32) static_cast<float*>(data)[i] = value;
    if constexpr (D == int4::kBfloat16) static_cast<uint16_t*>(data)[i] = float_to_bf16(value);
    if constexpr (D == int4::kFloat16) static_cast<uint16_t*>(data)[i] = float_to_fp16(value);
}

template <int D>
void widen_all(const void* data, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = read_at<D>(data, i);
}

void widen(const int4::Vector& x, int64_t count, float* out) {
    (x.dtype == int4::kFloat32    ? widen_all<int4::kFloat32>
     : x.dtype == int4::kBfloat16 ? widen_all<int4::kBfloat16>
                                  : widen_all<int4::kFloat16>)(x.data, count, out);
}

template <int D>
void narrow_all(const float* x, int64_t count, void* out) {
    for (int64_t i = 0; i < count; ++i) write_at<D>(x[i], out, i);
}

void narrow(const float* x, int32_t dtype, int64_t count, void* out) {
    (dtype == int4::kFloat32    ? narrow_all<int4::kFloat32>
     : dtype == int4::kBfloat16 ? narrow_all<int4::kBfloat16>
                                : narrow_all<int4::kFloat16>)(x, count, out);
}

// RMSNorm, arXiv:1910.07467, equation 4.
void normalize(const float* x, const float* weight, int64_t count, float epsilon, float* out) {
    const float scale = 1 / __builtin_sqrtf(sum_products(x, x, count) / float(count) + epsilon);
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] * scale * weight[i];
}

// exp(x) to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. Below -87 it is 0.
inline float exponential(float x) {
    const float bounded = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
    const float n = __builtin_rintf(bounded * 1.44269504088896341f);
    const float r = (bounded - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    const float value = p * bits_to_float(uint32_t(int32_t(n) + 127) << 23);
    return x < -87.0f ? 0.0f : x != x ? x : value;
}

// The sum of 16 lanes of products, folded in halves.
inline float dot_product(const float* a, const float* b, int64_t count) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] += a[i + j] * b[i + j];
    for (int64_t j = 0; i + j < count; ++j) lanes[j] += a[i + j] * b[i + j];
    for (int64_t half = kLanes / 2; half; half /= 2)
        for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    return lanes[0];
}

// SwiGLU, arXiv:2002.05202: gate * sigmoid(gate) * up.
void gate(const float* gates, const float* up, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = gates[i] / (1 + exponential(-gates[i])) * up[i];
}

constexpr int64_t kWidened = 16;  // tokens of the cache that are widened together, once for all the heads that share them

template <int D>
void widen_tokens(const void* data, int64_t first, int64_t count, int64_t dim, float* out) {
    for (int64_t i = 0; i < count * dim; ++i) out[i] = read_at<D>(data, first * dim + i);
}

// sum [dim] += the values of `count` tokens, [count, dim], each by its weight.
inline void add_values(const float* __restrict weights, const float* __restrict values, int64_t count, int64_t dim,
                       float* __restrict sum) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
        float lanes[kLanes];
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] = sum[d + j];
        for (int64_t t = 0; t < count; ++t)
            for (int64_t j = 0; j < kLanes; ++j) lanes[j] += weights[t] * values[t * dim + d + j];
        for (int64_t j = 0; j < kLanes; ++j) sum[d + j] = lanes[j];
    }
    for (; d < dim; ++d)
        for (int64_t t = 0; t < count; ++t) sum[d] += weights[t] * values[t * dim + d];
}

// Softmax without its division: scores become weights; returns the largest score and the sum of the weights.
inline void weigh(float* __restrict scores, int64_t count, float* top, float* weight) {
    float largest = scores[0], sum = 0;
    for (int64_t t = 1; t < count; ++t) largest = scores[t] > largest || scores[t] != scores[t] ? scores[t] : largest;
    for (int64_t t = 0; t < count; ++t) scores[t] = exponential(scores[t] - largest);
    for (int64_t t = 0; t < count; ++t) sum += scores[t];
    *top = largest;
    *weight = sum;
}

template <int D>
void attend_all(const int4::AttentionHead& a, int64_t begin, int64_t end, const int4::AttentionPart& out) {
    const int64_t dim = a.head_dim, count = end - begin;
    float* scores = new float[a.group * count + kWidened * dim];
    float* tokens = scores + a.group * count;
    const auto held = [&](int64_t t) { return count - t < kWidened ? count - t : kWidened; };
    for (int64_t t = 0; t < count; t += kWidened) {
        widen_tokens<D>(a.keys, begin + t, held(t), dim, tokens);
        for (int64_t g = 0; g < a.group; ++g)
            for (int64_t i = 0; i < held(t); ++i)
                scores[g * count + t + i] = dot_product(a.queries + g * dim, tokens + i * dim, dim);
    }
    for (int64_t g = 0; g < a.group; ++g) weigh(scores + g * count, count, out.top + g, out.weight + g);
    for (int64_t i = 0; i < a.group * dim; ++i) out.sum[i] = 0;
    for (int64_t t = 0; t < count; t += kWidened) {
        widen_tokens<D>(a.values, begin + t, held(t), dim, tokens);
        for (int64_t g = 0; g < a.group; ++g)
            add_values(scores + g * count + t, tokens, held(t), dim, out.sum + g * dim);
    }
    delete[] scores;
}

void attend(const int4::AttentionHead& a, int64_t begin, int64_t end, const int4::AttentionPart& out) {
    (a.dtype == int4::kFloat32    ? attend_all<int4::kFloat32>
     : a.dtype == int4::kBfloat16 ? attend_all<int4::kBfloat16>
                                  : attend_all<int4::kFloat16>)(a, begin, end, out);
}
