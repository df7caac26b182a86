// The kernels of tile.h on bfloat16 operands, two products an instruction (AVX-512 BF16), summed in float32.
#pragma once
#include "tile.h"

#if defined(__AVX512BF16__)
LALORA_BEGIN

struct Rows16 {  // (time, count) bfloat16 with unit stride along the features
    const uint16_t* data;
    int64_t stride, time, count;
    int64_t ahead;  // as in Panel
};

LALORA_FN __m512bh products(__m512i pairs) { return (__m512bh)pairs; }

// acc[j, f] += sum_t w[t, j] v[t, f] for J rank columns and 32 features from f on. w: rows of pairs (t, t + 1).
template <int J, bool Prefetch>
inline void gram_kernel16(const Rows16& v, int64_t f, const uint32_t* w, int64_t r, float* acc, int64_t acc_stride,
                          bool first) {
    const int64_t left = v.count - f;
    const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
    const __mmask16 low = (__mmask16)mask, high = (__mmask16)(mask >> 16);
    alignas(64) uint16_t order[2][32];  // zip the first, the last 16 values of two rows
    for (int i = 0; i < 32; ++i) order[0][i] = i / 2 + 32 * (i % 2), order[1][i] = 16 + i / 2 + 32 * (i % 2);
    const __m512i zip_first = _mm512_load_si512(order[0]), zip_last = _mm512_load_si512(order[1]);
    __m512 c[J][2];
    for (int j = 0; j < J; ++j) {
        c[j][0] = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(low, acc + j * acc_stride);
        c[j][1] = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(high, acc + j * acc_stride + 16);
    }
    const uint16_t* p = v.data + f;
    for (int64_t t = 0; t < v.time; t += 2, p += 2 * v.stride, w += r) {
        const __m512i a = _mm512_maskz_loadu_epi16(mask, p);
        const __m512i b = _mm512_maskz_loadu_epi16(t + 1 < v.time ? mask : 0, p + v.stride);
        if constexpr (Prefetch) prefetch(p + v.ahead), prefetch(p + v.ahead + v.stride);
        const __m512bh x0 = products(_mm512_permutex2var_epi16(a, zip_first, b));
        const __m512bh x1 = products(_mm512_permutex2var_epi16(a, zip_last, b));
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) {
            const __m512bh y = products(_mm512_set1_epi32(w[j]));
            c[j][0] = _mm512_dpbf16_ps(c[j][0], x0, y);
            c[j][1] = _mm512_dpbf16_ps(c[j][1], x1, y);
        }
    }
    for (int j = 0; j < J; ++j) {
        _mm512_mask_storeu_ps(acc + j * acc_stride, low, c[j][0]);
        _mm512_mask_storeu_ps(acc + j * acc_stride + 16, high, c[j][1]);
    }
}

template <int J, bool Prefetch>
inline void gram_rows16(const Rows16& v, int64_t f, const uint32_t* w, int64_t r, int64_t left, float* acc,
                        int64_t acc_stride, bool first) {
    for (; left >= J; left -= J, w += J, acc += J * acc_stride)
        gram_kernel16<J, Prefetch>(v, f, w, r, acc, acc_stride, first);
    if constexpr (J > 1)
        if (left) gram_rows16<J / 2, Prefetch>(v, f, w, r, left, acc, acc_stride, first);
}

// acc[j, f] (+)= sum_t w[t, j] v[t, f]; w (time, r) bfloat16; `pairs` holds (time + 1) / 2 * r words.
inline void gram16(const Rows16& v, const uint16_t* w, int64_t w_stride, int64_t r, uint32_t* pairs, float* acc,
                   int64_t acc_stride, bool first) {
    for (int64_t t = 0; t < v.time; t += 2)
        for (int64_t j = 0; j < r; ++j) {
            const uint32_t next = t + 1 < v.time ? w[(t + 1) * w_stride + j] : 0;
            pairs[t / 2 * r + j] = w[t * w_stride + j] | next << 16;
        }
    for (int64_t f = 0; f < v.count; f += 32) gram_rows16<8, true>(v, f, pairs, r, r, acc + f, acc_stride, first);
}

// One step of 32 features, or of the fewer that `mask` names; a masked load costs more than two whole ones.
template <int R, int J, bool Masked>
LALORA_FN void project_step16(const uint16_t* v, int64_t v_stride, const uint16_t* b, int64_t b_stride, __mmask32 mask,
                              __m512 (*c)[J]) {
    const auto at = [mask](const uint16_t* p) __attribute__((always_inline)) {
        return products(Masked ? _mm512_maskz_loadu_epi16(mask, p) : _mm512_loadu_si512(p));
    };
    __m512bh x[R];
#pragma GCC unroll 8
    for (int t = 0; t < R; ++t) {
        x[t] = at(v + t * v_stride);
        prefetch(v + (2 * R + t) * v_stride);
    }
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
        const __m512bh y = at(b + j * b_stride);
#pragma GCC unroll 8
        for (int t = 0; t < R; ++t) c[t][j] = _mm512_dpbf16_ps(c[t][j], x[t], y);
    }
}

// dz[t, j] (+)= scale sum_f v[t, f] b[j, f] for R rows of v and J of b.
template <int R, int J>
inline void project_kernel16(const Rows16& v, const uint16_t* p, const uint16_t* b, int64_t b_stride, float scale,
                             float* dz, int64_t dz_stride, bool add) {
    __m512 c[R][J];
    for (int t = 0; t < R; ++t)
        for (int j = 0; j < J; ++j) c[t][j] = _mm512_setzero_ps();
    int64_t f = 0;
    for (; f + 32 <= v.count; f += 32) project_step16<R, J, false>(p + f, v.stride, b + f, b_stride, 0, c);
    if (f < v.count) project_step16<R, J, true>(p + f, v.stride, b + f, b_stride, (1u << (v.count - f)) - 1, c);
    for (int t = 0; t < R; ++t) {
        vf sums[J];
        for (int j = 0; j < J; ++j) sums[j] = scale * (vf)c[t][j];
        sum_rows<J>(sums, dz + t * dz_stride, add);
    }
}

template <int R, int J>
inline void project_columns16(const Rows16& v, const uint16_t* p, const uint16_t* b, int64_t b_stride, int64_t r,
                              float scale, float* dz, int64_t dz_stride, bool add) {
    for (; r >= J; r -= J, b += J * b_stride, dz += J)
        project_kernel16<R, J>(v, p, b, b_stride, scale, dz, dz_stride, add);
    if constexpr (J > 1)
        if (r) project_columns16<R, J / 2>(v, p, b, b_stride, r, scale, dz, dz_stride, add);
}

// dz[t, j] (+)= scale sum_f v[t, f] b[j, f], j < r.
inline void project16(const Rows16& v, const uint16_t* b, int64_t b_stride, int64_t r, float scale, float* dz,
                      int64_t dz_stride, bool add) {
    int64_t t = 0;
    for (; t + 3 <= v.time; t += 3)
        project_columns16<3, 8>(v, v.data + t * v.stride, b, b_stride, r, scale, dz + t * dz_stride, dz_stride, add);
    for (; t < v.time; ++t)
        project_columns16<1, 8>(v, v.data + t * v.stride, b, b_stride, r, scale, dz + t * dz_stride, dz_stride, add);
}

LALORA_END
#endif
