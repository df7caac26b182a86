// The two register-blocked kernels of sample_grad. Both run their vectors along the features, so that a row of dy or
// x is loaded as it lies in memory, whatever the rank.
#pragma once
#include "vec.h"

LALORA_BEGIN

constexpr int kRows = kRegisters == 32 ? 8 : 4;   // rank columns in registers at once
constexpr int kTile = 3;                          // feature vectors at once, in a gradient
constexpr int kWide = kRegisters == 32 ? 6 : 4;   // ... where the rank is below kRows
constexpr int kMany = kRegisters == 32 ? 6 : 4;   // rows of dy at once, in a projection whose rank is below kRows
#if defined(__x86_64__) && !defined(__FMA__)
constexpr int kLines = 2;  // ... and where it is not: a product that is not fused with its sum takes a register, too
#else
constexpr int kLines = 3;
#endif
constexpr int64_t kFeatures = 1024;  // a block of kTime x kFeatures floats stays in half of L2
// Rows a power of two apart share few of the cache's sets, so that L2 keeps fewer rows than it has room for: up to 1.4
// times faster on a Cascade Lake with 32 than with 128, up to 1.2 times on a Zen 3 with 32 than with 64.
#if defined(__AVX512BF16__)
constexpr int64_t kTime = 128;
#elif defined(__x86_64__)
constexpr int64_t kTime = 32;
#else
constexpr int64_t kTime = 64;
#endif
// L1 likewise: where a gradient takes its features several times over, as with few registers, it goes by a copy.
constexpr bool kCopies = kRegisters == 16;

struct Panel {  // (time, vectors * W) float32 with unit stride along the features
    const float* data;
    int64_t stride;
    int64_t vectors;
    int64_t ahead;  // from here to the same place of the block that will be read next, for the prefetch
};

struct Block {  // `tail`: the last, partial vector of features, padded with zeros
    Panel main, tail;
};

// acc[j, f] += sum_t w[t, j] v[t, f] for J rank columns and F feature vectors. `copy` (time, F * W) may receive v.
template <int J, int F, bool Prefetch, bool Copy>
inline void gram_kernel(const float* v, int64_t v_stride, int64_t ahead, const float* w, int64_t w_stride, int64_t time,
                        float* acc, int64_t acc_stride, bool first, float* copy) {
    vf c[J][F];
    for (int j = 0; j < J; ++j)
        for (int f = 0; f < F; ++f) c[j][f] = first ? (vf){} : load(acc + j * acc_stride + f * W);
    for (int64_t t = 0; t < time; ++t) {
        vf x[F];
#pragma GCC unroll 8
        for (int f = 0; f < F; ++f) {
            x[f] = load(v + f * W);
            if constexpr (Prefetch) prefetch(v + ahead + f * W);
            if constexpr (Copy) store(copy + f * W, x[f]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j)
#pragma GCC unroll 8
            for (int f = 0; f < F; ++f) c[j][f] += w[j] * x[f];
        v += v_stride;
        w += w_stride;
        if constexpr (Copy) copy += F * W;
    }
    for (int j = 0; j < J; ++j)
        for (int f = 0; f < F; ++f) store(acc + j * acc_stride + f * W, c[j][f]);
}

template <int J, int F, bool First>
inline void gram_rows(const float* v, int64_t v_stride, int64_t ahead, const float* w, int64_t w_stride, int64_t r,
                      int64_t time, float* acc, int64_t acc_stride, bool first, float* copy) {
    constexpr bool copies = First && kCopies;
    if (r >= J) {
        if (copies && r > J) {
            gram_kernel<J, F, First, copies>(v, v_stride, ahead, w, w_stride, time, acc, acc_stride, first, copy);
            v = copy, v_stride = F * W;
        } else {
            gram_kernel<J, F, First, false>(v, v_stride, ahead, w, w_stride, time, acc, acc_stride, first, nullptr);
        }
        for (r -= J, w += J, acc += J * acc_stride; r >= J; r -= J, w += J, acc += J * acc_stride)
            gram_kernel<J, F, false, false>(v, v_stride, 0, w, w_stride, time, acc, acc_stride, first, nullptr);
        if constexpr (J > 1)
            if (r) gram_rows<J / 2, F, false>(v, v_stride, 0, w, w_stride, r, time, acc, acc_stride, first, copy);
    } else if constexpr (J > 1) {
        if (r) gram_rows<J / 2, F, First>(v, v_stride, ahead, w, w_stride, r, time, acc, acc_stride, first, copy);
    }
}

// acc[j, f] (+)= sum_t w[t, j] v[t, f], j < r, over a panel; acc (r, vectors * W).
inline void gram(const Panel& p, const float* w, int64_t w_stride, int64_t r, int64_t time, float* acc,
                 int64_t acc_stride, bool first) {
    alignas(64) float copy[kCopies ? kTime * kWide * W : 1];
    const float* v = p.data;
    int64_t f = 0;
    for (; r < kRows && f + kWide <= p.vectors; f += kWide, v += kWide * W, acc += kWide * W)
        gram_rows<kRows / 2, kWide, true>(v, p.stride, p.ahead, w, w_stride, r, time, acc, acc_stride, first, copy);
    for (; f + kTile <= p.vectors; f += kTile, v += kTile * W, acc += kTile * W)
        gram_rows<kRows, kTile, true>(v, p.stride, p.ahead, w, w_stride, r, time, acc, acc_stride, first, copy);
    for (; f < p.vectors; ++f, v += W, acc += W)
        gram_rows<kRows, 1, true>(v, p.stride, p.ahead, w, w_stride, r, time, acc, acc_stride, first, copy);
}

// dz[t, j] (+)= sum_f v[t, f] b[j, f] for R rows of v and J of b.
template <int R, int J, bool Prefetch>
inline void project_kernel(const float* v, const Panel& p, const float* b, int64_t b_stride, float* dz,
                           int64_t dz_stride, bool add) {
    vf c[R][J];
    for (int t = 0; t < R; ++t)
        for (int j = 0; j < J; ++j) c[t][j] = (vf){};
    const int64_t stride = p.stride, ahead = 2 * R * stride;  // two groups of rows on
    for (const float* end = v + p.vectors * W; v < end; v += W, b += W) {
        vf x[R];
#pragma GCC unroll 8
        for (int t = 0; t < R; ++t) {
            x[t] = load(v + t * stride);
            if constexpr (Prefetch) prefetch(v + ahead + t * stride);
        }
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) {
            vf y = load(b + j * b_stride);
            in_register(y);
#pragma GCC unroll 8
            for (int t = 0; t < R; ++t) c[t][j] += x[t] * y;
        }
    }
    for (int t = 0; t < R; ++t) sum_rows<J>(c[t], dz + t * dz_stride, add);
}

template <int R, int J, bool Prefetch>
inline void project_columns(const float* v, const Panel& p, const float* b, int64_t b_stride, int64_t r, float* dz,
                            int64_t dz_stride, bool add) {
    if (r >= J) {
        project_kernel<R, J, Prefetch>(v, p, b, b_stride, dz, dz_stride, add);
        for (r -= J, b += J * b_stride, dz += J; r >= J; r -= J, b += J * b_stride, dz += J)
            project_kernel<R, J, false>(v, p, b, b_stride, dz, dz_stride, add);
        if constexpr (J > 1)
            if (r) project_columns<R, J / 2, false>(v, p, b, b_stride, r, dz, dz_stride, add);
    } else if constexpr (J > 1) {
        if (r) project_columns<R, J / 2, Prefetch>(v, p, b, b_stride, r, dz, dz_stride, add);
    }
}

// dz[t, j] (+)= sum_f v[t, f] b[j, f], j < r; b (r, vectors * W). All of r for a few rows, which then are in L1.
inline void project(const Panel& p, const float* b, int64_t b_stride, int64_t r, int64_t time, float* dz,
                    int64_t dz_stride, bool add) {
    int64_t t = 0;
    const float* v = p.data;
    for (; r < kRows && t + kMany <= time; t += kMany)
        project_columns<kMany, kRows / 2, true>(v + t * p.stride, p, b, b_stride, r, dz + t * dz_stride, dz_stride,
                                                add);
    for (; t + kLines <= time; t += kLines)
        project_columns<kLines, kRows, true>(v + t * p.stride, p, b, b_stride, r, dz + t * dz_stride, dz_stride, add);
    for (; t < time; ++t)
        project_columns<1, kRows, true>(v + t * p.stride, p, b, b_stride, r, dz + t * dz_stride, dz_stride, add);
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A row stride that does not send every row to the same cache set.
inline int64_t padded_stride(int64_t n) {
    n = round_up(n, W);
    return n % 256 ? n : n + 16;
}

// Row `count` features of a strided float32 or bfloat16 row as float32.
inline void convert_row(const void* data, int32_t dtype, int64_t offset, int64_t stride, int64_t count, float* out) {
    if (dtype == kFloat32) {
        const float* p = (const float*)data + offset;
        for (int64_t i = 0; i < count; ++i) out[i] = p[i * stride];
        return;
    }
    const uint16_t* p = (const uint16_t*)data + offset;
    int64_t i = 0;
    if (stride == 1)
        for (; i + W <= count; i += W) store(out + i, load_bfloat16(p + i));
    for (; i < count; ++i) out[i] = from_bfloat16(p[i * stride]);
}

// Rows t0 .. t0+time-1, features f0 .. f0+count-1 of one sample. float32 with unit stride is used where it lies;
// anything else is converted into `buffer` (kTime * padded_stride(kFeatures) floats, then kTime * W for the tail).
inline Block load_block(const Batch& b, int64_t sample, int64_t t0, int64_t time, int64_t f0, int64_t count,
                        int64_t ahead, float* buffer) {
    const int64_t whole = count / W * W, rest = count - whole, stride = padded_stride(count);
    const int64_t origin = sample * b.stride0 + t0 * b.stride1 + f0 * b.stride2;
    const bool direct = b.dtype == kFloat32 && b.stride2 == 1;
    float* tail = buffer + kTime * padded_stride(kFeatures);
    for (int64_t t = 0; t < time; ++t) {
        const int64_t row = origin + t * b.stride1;
        if (b.dtype == kBFloat16 && b.stride2 == 1)
            for (int64_t f = 0; f < count; f += 32) prefetch((const uint16_t*)b.data + row + 8 * b.stride1 + f);
        if (!direct) convert_row(b.data, b.dtype, row, b.stride2, whole, buffer + t * stride);
        if (!rest) continue;
        convert_row(b.data, b.dtype, row + whole * b.stride2, b.stride2, rest, tail + t * W);
        for (int64_t f = rest; f < W; ++f) tail[t * W + f] = 0.0f;
    }
    const Panel main = direct ? Panel{(const float*)b.data + origin, b.stride1, whole / W, ahead}
                              : Panel{buffer, stride, whole / W, 0};
    return {main, {tail, W, rest ? 1 : 0, 0}};
}
constexpr int64_t kBlockFloats = kTime * (kFeatures + 16) + kTime * W;

LALORA_END
