// One vector of W float lanes, by the compiler's vector extension, as wide as the instruction set this file is
// compiled for. Everything is static or lives in the instruction set's namespace: a weak symbol compiled for AVX-512
// must never be the one that a machine without it runs.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../lalora.h"

#define LALORA_BEGIN     \
    namespace lalora {   \
    namespace LALORA_ISA { \
    namespace {
#define LALORA_END \
    }              \
    }              \
    }

LALORA_BEGIN

#if defined(__AVX512F__)
constexpr int W = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int W = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int W = 4, kRegisters = 32;
#else
constexpr int W = 4, kRegisters = 16;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));      // W bfloat16
typedef float vf_half __attribute__((vector_size(2 * W)));    // half the lanes
typedef double vd __attribute__((vector_size(4 * W)));        // half the lanes
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4)));

LALORA_FN vf load(const float* p) { return *(const vf_any*)p; }
LALORA_FN void store(float* p, vf v) { *(vf_any*)p = v; }
LALORA_FN void prefetch(const void* p) {  // into L2
    __builtin_prefetch(p, 0, 2);
    asm volatile("");  // GCC holds a function that only prefetches for one without effect, and drops its calls
}
LALORA_FN vf splat(float f) { return f - (vf){}; }

// Keeps a value that several products share in a register: GCC would load it again for each of them.
LALORA_FN void in_register(vf& v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#else
    (void)v;
#endif
}

LALORA_FN float from_bfloat16(uint16_t b) {
    const uint32_t bits = (uint32_t)b << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

LALORA_FN uint16_t to_bfloat16(float f) {  // round to nearest even; a NaN stays one
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return f != f ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

LALORA_FN vf load_bfloat16(const uint16_t* p) {
    vh b;
    memcpy(&b, p, sizeof b);
    return (vf)(__builtin_convertvector(b, vu) << 16);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LALORA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef LALORA_SHUFFLE
#define LALORA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

#if defined(__AVX512F__)
#define LALORA_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LALORA_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define LALORA_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define LALORA_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX2__)
#define LALORA_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define LALORA_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define LALORA_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define LALORA_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define LALORA_LOW 0, 4, 1, 5
#define LALORA_HIGH 2, 6, 3, 7
#define LALORA_EVEN 0, 2, 4, 6
#define LALORA_ODD 1, 3, 5, 7
#endif

// a0 b0 a1 b1 ...: the first and the last W of the 2 W interleaved lanes.
LALORA_FN vf zip_low(vf a, vf b) { return LALORA_SHUFFLE(a, b, LALORA_LOW); }
LALORA_FN vf zip_high(vf a, vf b) { return LALORA_SHUFFLE(a, b, LALORA_HIGH); }
// a0+a1 a2+a3 ... b0+b1 b2+b3 ...
LALORA_FN vf add_pairs(vf a, vf b) { return LALORA_SHUFFLE(a, b, LALORA_EVEN) + LALORA_SHUFFLE(a, b, LALORA_ODD); }

// rows[j] holds lane p of row j; afterwards the K W floats of `rows`, in order, run over j first and p second.
template <int K>
LALORA_FN void interleave(vf* rows) {
    if constexpr (K > 1) {
        vf low[K / 2], high[K / 2];
        for (int j = 0; j < K / 2; ++j) {
            low[j] = zip_low(rows[j], rows[j + K / 2]);
            high[j] = zip_high(rows[j], rows[j + K / 2]);
        }
        interleave<K / 2>(low);
        interleave<K / 2>(high);
        for (int j = 0; j < K / 2; ++j) rows[j] = low[j], rows[j + K / 2] = high[j];
    }
}

// out[k] (+)= sum of the lanes of c[k], K a power of two.
template <int K>
LALORA_FN void sum_rows(vf* c, float* out, bool add) {
    constexpr int group = K < W ? K : W;
    for (int k0 = 0; k0 < K; k0 += group) {
        for (int left = group; left > 1; left /= 2)
            for (int i = 0; i < left / 2; ++i) c[k0 + i] = add_pairs(c[k0 + 2 * i], c[k0 + 2 * i + 1]);
        for (int lanes = W / group; lanes > 1; lanes /= 2) c[k0] = add_pairs(c[k0], c[k0]);
        float sums[W];
        store(sums, c[k0]);
        for (int k = 0; k < group; ++k) out[k0 + k] = add ? out[k0 + k] + sums[k] : sums[k];
    }
}

LALORA_FN vd add_squares(vd sum, vf v) {  // in double: the square of a finite float32 does not overflow
    vf_half half[2];
    memcpy(half, &v, sizeof v);
    const vd low = __builtin_convertvector(half[0], vd), high = __builtin_convertvector(half[1], vd);
    return sum + low * low + high * high;
}

LALORA_FN double sum_lanes(vd v) {
    double lanes[W / 2], sum = 0;
    memcpy(lanes, &v, sizeof v);
    for (int i = 0; i < W / 2; ++i) sum += lanes[i];
    return sum;
}

struct VectorOps {  // for chacha20.h: one lane, one block
    using F = vf;
    using I = vi;
    using U = vu;
    static LALORA_FN F to_float(I i) { return __builtin_convertvector(i, vf); }
    static LALORA_FN I bits(F f) { return (vi)f; }
    static LALORA_FN F from_bits(I i) { return (vf)i; }
    static LALORA_FN F sqrt(F f) {
#if defined(__AVX512F__)
        return (vf)_mm512_maskz_sqrt_ps((__mmask16)-1, (__m512)f);
#elif defined(__AVX2__)
        return (vf)_mm256_sqrt_ps((__m256)f);
#elif defined(__x86_64__)
        return (vf)_mm_sqrt_ps((__m128)f);
#elif defined(__aarch64__)
        return (vf)vsqrtq_f32((float32x4_t)f);
#else
        for (int i = 0; i < W; ++i) f[i] = __builtin_sqrtf(f[i]);
        return f;
#endif
    }
};

LALORA_END
