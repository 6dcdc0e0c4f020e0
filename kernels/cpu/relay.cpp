// Codes of other tools' packed weights, re-laid in the order of this one's.
#include <algorithm>
#include <cstdint>

#include "pool.h"

namespace int4 {
namespace {

constexpr int kWords = 16;  // of a tile in one input: a cache line of theirs
constexpr int kPairs = 32;  // of inputs in a tile; a pair is a byte of ours
constexpr uint32_t kLowNibbles = 0x0F0F0F0F;
constexpr int kRowOfNibble[8] = {0, 2, 4, 6, 1, 3, 5, 7};

// Re-lay words [word, word + words) of pairs [pair, pair + pairs); `row_words` in an input, `row_bytes` in a row of ours.
void relay_tile(const uint32_t* theirs, uint8_t* ours, int64_t row_words, int64_t row_bytes, int64_t word, int words,
                int64_t pair, int pairs) {
    alignas(64) uint32_t even[kPairs][kWords], odd[kPairs][kWords];  // nibbles 0 2 4 6 of two inputs, and 1 3 5 7
    for (int p = 0; p < pairs; ++p) {
        const uint32_t* first = theirs + 2 * (pair + p) * row_words + word;
        const uint32_t* second = first + row_words;
        for (int w = 0; w < words; ++w) {
            even[p][w] = (first[w] & kLowNibbles) | (second[w] & kLowNibbles) << 4;
            odd[p][w] = (first[w] >> 4 & kLowNibbles) | (second[w] & ~kLowNibbles);
        }
    }
    for (int w = 0; w < words; ++w)
        for (int nibble = 0; nibble < 8; ++nibble) {
            const uint32_t(*from)[kWords] = nibble % 2 ? odd : even;
            const int shift = nibble / 2 * 8;
            uint8_t* to = ours + ((word + w) * 8 + kRowOfNibble[nibble]) * row_bytes + pair;
            for (int p = 0; p < pairs; ++p) to[p] = uint8_t(from[p][w] >> shift);
        }
}

}  // namespace
}  // namespace int4

extern "C" {

// AWQ's qweight [inputs, row_words] as codes [row_words * 8, inputs / 2]; `inputs` is even.
void int4_relay_awq(int threads, const uint32_t* theirs, uint8_t* ours, int64_t inputs, int64_t row_words) {
    using namespace int4;
    const int64_t pairs = inputs / 2, columns = (row_words + kWords - 1) / kWords;
    pool().run(threads, columns, 1, [=](int64_t begin, int64_t end) {
        for (int64_t word = begin * kWords; word < std::min(end * kWords, row_words); word += kWords)
            for (int64_t pair = 0; pair < pairs; pair += kPairs)
                relay_tile(theirs, ours, row_words, pairs, word, int(std::min<int64_t>(kWords, row_words - word)), pair,
                           int(std::min<int64_t>(kPairs, pairs - pair)));
    });
}

}  // extern "C"
