// Formats of rows as ggml lays them out: how to make one block at random, and which numbers it stands for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>

#include "ggml.h"

namespace {

std::mt19937 rng(1);

int uniform(int first, int last) { return std::uniform_int_distribution<int>(first, last)(rng); }

// --- numbers in bits ---

double from_f16(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return h & 0x8000 ? -size : size;
}

double from_bf16(uint16_t h) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof(f));
    return f;
}

// Halves between 2^-8 and 4, of either sign, and now and then one below the normal ones.
uint16_t random_f16() { return static_cast<uint16_t>(uniform(0, 1) << 15 | (uniform(0, 40) ? uniform(7, 16) : 0) << 10 | uniform(0, 1023)); }
uint16_t random_bf16() { return static_cast<uint16_t>(uniform(0, 1) << 15 | uniform(119, 128) << 7 | uniform(0, 127)); }

uint16_t word(const uint8_t * p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }
void put_word(uint8_t * p, uint16_t w) { p[0] = static_cast<uint8_t>(w), p[1] = static_cast<uint8_t>(w >> 8); }
float number(const uint8_t * p) {
    float f;
    std::memcpy(&f, p, sizeof(f));
    return f;
}
void put_number(uint8_t * p, float f) { std::memcpy(p, &f, sizeof(f)); }

// --- formats: how to make one block at random, and which numbers it stands for ---

struct format {
    const char * name;
    int ggml_type;
    int elements, bytes;  // of a block
    void (*make)(uint8_t * block);
    void (*read)(const uint8_t * block, double * out);
    const format * x;  // of the activations
};

void make_f32(uint8_t * b) { put_number(b, std::normal_distribution<float>()(rng)); }
void read_f32(const uint8_t * b, double * out) { *out = number(b); }
void make_f16(uint8_t * b) { put_word(b, random_f16()); }
void read_f16(const uint8_t * b, double * out) { *out = from_f16(word(b)); }
void make_bf16(uint8_t * b) { put_word(b, random_bf16()); }
void read_bf16(const uint8_t * b, double * out) { *out = from_bf16(word(b)); }

void random_bytes(uint8_t * p, int n) { std::generate(p, p + n, [] { return static_cast<uint8_t>(uniform(0, 255)); }); }

void make_q8_0(uint8_t * b) {
    put_word(b, random_f16());
    random_bytes(b + 2, 32);
}
// Activations, which ggml never rounds to -128.
void make_q8_0_x(uint8_t * b) {
    put_word(b, random_f16());
    std::generate(b + 2, b + 34, [] { return static_cast<uint8_t>(uniform(-127, 127)); });
}
void read_q8_0(const uint8_t * b, double * out) {
    for (int i = 0; i < 32; i++) {
        out[i] = from_f16(word(b)) * static_cast<int8_t>(b[2 + i]);
    }
}

// Like q8_0, with another half after the scale, which no kernel of ours reads.
void make_q8_1_x(uint8_t * b) {
    make_q8_0_x(b + 2);
    std::memmove(b, b + 2, 2);
    put_word(b + 2, random_f16());
}
void read_q8_1(const uint8_t * b, double * out) {
    for (int i = 0; i < 32; i++) {
        out[i] = from_f16(word(b)) * static_cast<int8_t>(b[4 + i]);
    }
}

// d; in q4_1 and q5_1 a number that is added to all weights; in q5_0 and q5_1 32 fifth bits; 16 bytes of nibbles, those of the first half in the low ones.
template <int bytes, bool least> void make_block(uint8_t * b) {
    random_bytes(b, bytes);
    put_word(b, random_f16());
    if (least) {
        put_word(b + 2, random_f16());
    }
}
template <bool least, bool five> void read_block(const uint8_t * b, double * out) {
    const uint8_t *bits = b + (least ? 4 : 2), *q = bits + (five ? 4 : 0);
    for (int i = 0; i < 32; i++) {
        const int nibble = i < 16 ? q[i] & 15 : q[i - 16] >> 4;
        const int v = nibble + (five ? 16 * (bits[i / 8] >> i % 8 & 1) : 0);
        out[i] = from_f16(word(b)) * (least ? v : v - (five ? 16 : 8)) + (least ? from_f16(word(b + 2)) : 0);
    }
}

const int CODEBOOK[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
void read_iq4_nl(const uint8_t * b, double * out) {
    for (int i = 0; i < 32; i++) {
        out[i] = from_f16(word(b)) * CODEBOOK[i < 16 ? b[2 + i] & 15 : b[2 + i - 16] >> 4];
    }
}

// Activations for k-quants: a scale, 256 values, and the sums of every 16 of them.
void make_q8_K(uint8_t * b) {
    put_number(b, std::normal_distribution<float>()(rng));
    for (int i = 0; i < 16; i++) {
        int sum = 0;
        for (int j = 0; j < 16; j++) {
            const int v = uniform(-127, 127);
            b[4 + 16 * i + j] = static_cast<uint8_t>(v);
            sum += v;
        }
        put_word(b + 260 + 2 * i, static_cast<uint16_t>(sum));
    }
}
void read_q8_K(const uint8_t * b, double * out) {
    for (int i = 0; i < 256; i++) {
        out[i] = static_cast<double>(number(b)) * static_cast<int8_t>(b[4 + i]);
    }
}

// d, dmin; eight scales and eight minima of 6 bits in 12 bytes; in q5_K 32 bytes of fifth bits; 128 bytes of nibbles, the low ones of 32 bytes before the high ones.
template <int bytes> void make_with_minima(uint8_t * b) {
    put_word(b, random_f16());
    put_word(b + 2, random_f16());
    random_bytes(b + 4, bytes - 4);
}
template <bool five> void read_with_minima(const uint8_t * b, double * out) {
    const uint8_t *s = b + 4, *fifth = b + 16, *q = five ? b + 48 : b + 16;
    for (int j = 0; j < 8; j++) {
        const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
        const int least = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
        for (int i = 0; i < 32; i++) {
            const int v = (j % 2 ? q[j / 2 * 32 + i] >> 4 : q[j / 2 * 32 + i] & 15) + (five ? 16 * (fifth[i] >> j & 1) : 0);
            out[32 * j + i] = from_f16(word(b)) * scale * v - from_f16(word(b + 2)) * least;
        }
    }
}

// 128 bytes of low nibbles, 64 bytes of high pairs of bits, 16 scales of 8 bits, d.
void make_q6_K(uint8_t * b) {
    random_bytes(b, 208);
    put_word(b + 208, random_f16());
}
void read_q6_K(const uint8_t * b, double * out) {
    for (int i = 0; i < 256; i++) {
        const int half = i / 128, quarter = i % 128 / 32, at = i % 32;  // two halves of 128, in each four runs of 32
        const uint8_t nibbles = b[half * 64 + quarter % 2 * 32 + at], pairs = b[128 + half * 32 + at];
        const int v = (quarter < 2 ? nibbles & 15 : nibbles >> 4) | (pairs >> 2 * quarter & 3) << 4;
        out[i] = from_f16(word(b + 208)) * static_cast<int8_t>(b[192 + i / 16]) * (v - 32);
    }
}

// d; of eight scales the upper two bits in 16, the lower four in 4 bytes; 128 bytes of nibbles, of 32 columns the first 16 in the low ones.
void make_iq4_xs(uint8_t * b) {
    random_bytes(b, 136);
    put_word(b, random_f16());
}
void read_iq4_xs(const uint8_t * b, double * out) {
    for (int i = 0; i < 256; i++) {
        const int j = i / 32, scale = (b[4 + j / 2] >> j % 2 * 4 & 15) | (word(b + 2) >> 2 * j & 3) << 4;
        const uint8_t both = b[8 + 16 * j + i % 16];
        out[i] = from_f16(word(b)) * (scale - 32) * CODEBOOK[i % 32 < 16 ? both & 15 : both >> 4];
    }
}

const format F32 = {"f32", GGML_TYPE_F32, 1, 4, make_f32, read_f32, &F32};
const format F16 = {"f16", GGML_TYPE_F16, 1, 2, make_f16, read_f16, &F16};
const format BF16 = {"bf16", GGML_TYPE_BF16, 1, 2, make_bf16, read_bf16, &BF16};
const format Q8_0_X = {"q8_0", GGML_TYPE_Q8_0, 32, 34, make_q8_0_x, read_q8_0, nullptr};
const format Q8_0 = {"q8_0", GGML_TYPE_Q8_0, 32, 34, make_q8_0, read_q8_0, &Q8_0_X};
const format Q4_0 = {"q4_0", GGML_TYPE_Q4_0, 32, 18, make_block<18, false>, read_block<false, false>, &Q8_0_X};
const format Q8_1_X = {"q8_1", GGML_TYPE_Q8_1, 32, 36, make_q8_1_x, read_q8_1, nullptr};
const format Q4_1 = {"q4_1", GGML_TYPE_Q4_1, 32, 20, make_block<20, true>, read_block<true, false>, &Q8_1_X};
const format Q5_0 = {"q5_0", GGML_TYPE_Q5_0, 32, 22, make_block<22, false>, read_block<false, true>, &Q8_0_X};
const format Q5_1 = {"q5_1", GGML_TYPE_Q5_1, 32, 24, make_block<24, true>, read_block<true, true>, &Q8_1_X};
const format IQ4_NL = {"iq4_nl", GGML_TYPE_IQ4_NL, 32, 18, make_block<18, false>, read_iq4_nl, &Q8_0_X};
const format Q8_K = {"q8_K", GGML_TYPE_Q8_K, 256, 292, make_q8_K, read_q8_K, nullptr};
const format Q4_K = {"q4_K", GGML_TYPE_Q4_K, 256, 144, make_with_minima<144>, read_with_minima<false>, &Q8_K};
const format Q5_K = {"q5_K", GGML_TYPE_Q5_K, 256, 176, make_with_minima<176>, read_with_minima<true>, &Q8_K};
const format Q6_K = {"q6_K", GGML_TYPE_Q6_K, 256, 210, make_q6_K, read_q6_K, &Q8_K};
const format IQ4_XS = {"iq4_xs", GGML_TYPE_IQ4_XS, 256, 136, make_iq4_xs, read_iq4_xs, &Q8_K};
const format * const FORMATS[] = {&F32, &F16, &BF16, &Q8_0, &Q4_0, &Q4_1, &Q5_0, &Q5_1, &IQ4_NL, &Q4_K, &Q5_K, &Q6_K, &IQ4_XS};

}  // namespace
