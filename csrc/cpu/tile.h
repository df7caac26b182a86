// The two register-blocked kernels of sample_grad. Both run their vectors along the features, so that a row of dy or
// x is loaded as it lies in memory, whatever the rank.
#pragma once
#include "vec.h"

LALORA_BEGIN

constexpr int kRows = kRegisters == 32 ? 8 : 4;   // rank columns in registers at once
constexpr int kWide = kRegisters == 32 ? 6 : 4;   // feature vectors at once where the rank is below kRows
constexpr int64_t kTime = 64, kFeatures = 1024;   // a block of kTime x kFeatures floats stays in L2

struct Panel {  // (time, vectors * W) float32 with unit stride along the features
    const float* data;
    int64_t stride;
    int64_t vectors;
};

struct Block {  // `tail`: the last, partial vector of features, padded with zeros
    Panel main, tail;
};

// acc[j, f] += sum_t w[t, j] v[t, f] for J rank columns and F feature vectors.
template <int J, int F>
inline void gram_kernel(const float* v, int64_t v_stride, const float* w, int64_t w_stride, int64_t time, float* acc,
                        int64_t acc_stride, bool first) {
    vf c[J][F];
    for (int j = 0; j < J; ++j)
        for (int f = 0; f < F; ++f) c[j][f] = first ? (vf){} : load(acc + j * acc_stride + f * W);
    for (int64_t t = 0; t < time; ++t) {
        vf x[F];
#pragma GCC unroll 8
        for (int f = 0; f < F; ++f) {
            x[f] = load(v + f * W);
            __builtin_prefetch(v + (F + f) * W);  // the next tile's line of this row
        }
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j)
#pragma GCC unroll 8
            for (int f = 0; f < F; ++f) c[j][f] += w[j] * x[f];
        v += v_stride;
        w += w_stride;
    }
    for (int j = 0; j < J; ++j)
        for (int f = 0; f < F; ++f) store(acc + j * acc_stride + f * W, c[j][f]);
}

template <int J, int F>
inline void gram_rows(const float* v, int64_t v_stride, const float* w, int64_t w_stride, int64_t r, int64_t time,
                      float* acc, int64_t acc_stride, bool first) {
    for (; r >= J; r -= J, w += J, acc += J * acc_stride)
        gram_kernel<J, F>(v, v_stride, w, w_stride, time, acc, acc_stride, first);
    if constexpr (J > 1)
        if (r) gram_rows<J / 2, F>(v, v_stride, w, w_stride, r, time, acc, acc_stride, first);
}

// acc[j, f] (+)= sum_t w[t, j] v[t, f], j < r, over a panel; acc (r, vectors * W).
inline void gram(Panel v, const float* w, int64_t w_stride, int64_t r, int64_t time, float* acc, int64_t acc_stride,
                 bool first) {
    int64_t f = 0;
    for (; r < kRows && f + kWide <= v.vectors; f += kWide)
        gram_rows<kRows / 2, kWide>(v.data + f * W, v.stride, w, w_stride, r, time, acc + f * W, acc_stride, first);
    for (; f + 3 <= v.vectors; f += 3)
        gram_rows<kRows, 3>(v.data + f * W, v.stride, w, w_stride, r, time, acc + f * W, acc_stride, first);
    if (f + 2 <= v.vectors) {
        gram_rows<kRows, 2>(v.data + f * W, v.stride, w, w_stride, r, time, acc + f * W, acc_stride, first);
        f += 2;
    }
    if (f < v.vectors)
        gram_rows<kRows, 1>(v.data + f * W, v.stride, w, w_stride, r, time, acc + f * W, acc_stride, first);
}

// dz[t, j] (+)= sum_f v[t, f] b[j, f] for R rows of v and J of b.
template <int R, int J>
inline void project_kernel(const float* v, int64_t v_stride, int64_t vectors, const float* b, int64_t b_stride,
                           float* dz, int64_t dz_stride, bool add) {
    vf c[R][J];
    for (int t = 0; t < R; ++t)
        for (int j = 0; j < J; ++j) c[t][j] = (vf){};
    for (int64_t f = 0; f < vectors; ++f) {
        vf x[R];
#pragma GCC unroll 8
        for (int t = 0; t < R; ++t) x[t] = load(v + t * v_stride);
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) {
            const vf y = load(b + j * b_stride);
#pragma GCC unroll 8
            for (int t = 0; t < R; ++t) c[t][j] += x[t] * y;
        }
        v += W;
        b += W;
    }
    for (int t = 0; t < R; ++t) sum_rows<J>(c[t], dz + t * dz_stride, add);
}

template <int J>
inline void project_rows(Panel v, const float* b, int64_t b_stride, int64_t r, int64_t time, float* dz,
                         int64_t dz_stride, bool add) {
    constexpr int R = J == kRows ? 3 : 6;
    for (; r >= J; r -= J, b += J * b_stride, dz += J) {
        int64_t t = 0;
        for (; t + R <= time; t += R)
            project_kernel<R, J>(v.data + t * v.stride, v.stride, v.vectors, b, b_stride, dz + t * dz_stride,
                                 dz_stride, add);
        for (; t < time; ++t)
            project_kernel<1, J>(v.data + t * v.stride, v.stride, v.vectors, b, b_stride, dz + t * dz_stride,
                                 dz_stride, add);
    }
    if constexpr (J > 1)
        if (r) project_rows<J / 2>(v, b, b_stride, r, time, dz, dz_stride, add);
}

// dz[t, j] (+)= sum_f v[t, f] b[j, f], j < r; b (r, vectors * W).
inline void project(Panel v, const float* b, int64_t b_stride, int64_t r, int64_t time, float* dz, int64_t dz_stride,
                    bool add) {
    project_rows<kRows>(v, b, b_stride, r, time, dz, dz_stride, add);
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
                        float* buffer) {
    const int64_t whole = count / W * W, rest = count - whole, stride = padded_stride(count);
    const int64_t origin = sample * b.stride0 + t0 * b.stride1 + f0 * b.stride2;
    const bool direct = b.dtype == kFloat32 && b.stride2 == 1;
    float* tail = buffer + kTime * padded_stride(kFeatures);
    for (int64_t t = 0; t < time; ++t) {
        const int64_t row = origin + t * b.stride1;
        if (!direct) convert_row(b.data, b.dtype, row, b.stride2, whole, buffer + t * stride);
        if (!rest) continue;
        convert_row(b.data, b.dtype, row + whole * b.stride2, b.stride2, rest, tail + t * W);
        for (int64_t f = rest; f < W; ++f) tail[t * W + f] = 0.0f;
    }
    const Panel main = direct ? Panel{(const float*)b.data + origin, b.stride1, whole / W}
                              : Panel{buffer, stride, whole / W};
    return {main, {tail, W, rest ? 1 : 0}};
}
constexpr int64_t kBlockFloats = kTime * (kFeatures + 16) + kTime * W;

LALORA_END
