// What sample_grad and sample_grad_clip share: splitting features into chunks, one block of features of one sample,
// and turning (r, features) accumulators into gradients.
#pragma once
#include "scratch.h"
#include "tile.h"
#include "tile_bf16.h"

LALORA_BEGIN

inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

struct Chunks {  // of the feature axis; from the shapes alone, so that no result depends on the number of threads
    int64_t size, count;
};

inline Chunks split(int64_t features, int64_t pieces, int64_t smallest) {
    const int64_t size = at_least(smallest, round_up((features + pieces - 1) / pieces, 3 * W));
    return {size, at_least(1, (features + size - 1) / size)};
}

struct Operands {  // of one factor's gradient: G = w^T v; with b, dz = v b^T too
    Batch v, w;
    int64_t T, r;
    const float* b;
    int64_t b_stride;
    bool pairs;  // v, w and b are bfloat16 for tile_bf16.h, b still without the scaling
    float scaling;
};

// Whether dy, h and B go to tile_bf16.h as they are. x never does: its other operand is the float32 dz, and rounding it
// would cost more digits than bfloat16 inputs have lost.
inline bool takes_pairs(const SampleGrad& p) {
#if defined(__AVX512BF16__)
    return p.dy.dtype == kBFloat16 && p.dy.stride2 == 1 && p.B.dtype == kBFloat16 &&
           (!p.sq_B || (p.h.dtype == kBFloat16 && p.h.stride2 == 1));
#else
    (void)p;
    return false;
#endif
}

inline int64_t work_floats(int64_t r) { return kBlockFloats + kTime * r; }

// Features f0 .. f0+count-1 (at most kFeatures) of one sample, over all of T: every value is read from memory once.
// acc (r, acc_stride) is written where given, dz (T, r) is written or added to where given. Feature next_f of sample
// next_sample is where the thread will read next.
inline void feature_block(const Operands& o, int64_t sample, int64_t f0, int64_t count, int64_t next_sample,
                          int64_t next_f, float* acc, int64_t acc_stride, float* dz, bool dz_add, float* work) {
    if (acc && o.T == 0)
        for (int64_t j = 0; j < o.r; ++j) memset(acc + j * acc_stride, 0, round_up(count, W) * sizeof(float));
    const int64_t blocks = (o.T + kTime - 1) / kTime, even = blocks ? (o.T + blocks - 1) / blocks : 1;
    for (int64_t t0 = 0; t0 < o.T; t0 += even) {
        const int64_t time = at_most(even, o.T - t0);
        // Projecting brings the block into L2, so that its gradient can fetch the next block meanwhile. Without it,
        // the gradient fetches its own next tile.
        int64_t ahead = kTile * W;
        if (dz && acc)
            ahead = t0 + time < o.T ? time * o.v.stride1
                                    : (next_sample - sample) * o.v.stride0 + next_f - f0 - t0 * o.v.stride1;
        const int64_t origin = sample * o.w.stride0 + t0 * o.w.stride1;
#if defined(__AVX512BF16__)
        if (o.pairs) {
            const uint16_t* data = (const uint16_t*)o.v.data + sample * o.v.stride0 + t0 * o.v.stride1 + f0;
            const Rows16 v = {data, o.v.stride1, time, count, ahead};
            const uint16_t* b = (const uint16_t*)o.b + f0;
            if (dz) project16(v, b, o.b_stride, o.r, o.scaling, dz + t0 * o.r, o.r, dz_add);
            if (acc)
                gram16(v, (const uint16_t*)o.w.data + origin, o.w.stride1, o.r, (uint32_t*)(work + kBlockFloats), acc,
                       acc_stride, t0 == 0);
            continue;
        }
#endif
        const Block v = load_block(o.v, sample, t0, time, f0, count, ahead, work);
        if (dz) {
            project(v.main, o.b + f0, o.b_stride, o.r, time, dz + t0 * o.r, o.r, dz_add);
            if (v.tail.vectors)
                project(v.tail, o.b + f0 + v.main.vectors * W, o.b_stride, o.r, time, dz + t0 * o.r, o.r, true);
        }
        if (!acc) continue;
        const float* w = (const float*)o.w.data + origin;
        int64_t w_stride = o.w.stride1;
        if (o.w.dtype != kFloat32 || o.w.stride2 != 1) {
            float* rows = work + kBlockFloats;
            for (int64_t t = 0; t < time; ++t)
                convert_row(o.w.data, o.w.dtype, origin + t * o.w.stride1, o.w.stride2, o.r, rows + t * o.r);
            w = rows, w_stride = o.r;
        }
        gram(v.main, w, w_stride, o.r, time, acc, acc_stride, t0 == 0);
        if (v.tail.vectors)
            gram(v.tail, w, w_stride, o.r, time, acc + v.main.vectors * W, acc_stride, t0 == 0);
    }
}

// Columns of acc (r, acc_stride), times scale, as rows of G (count, r), added to what is there or not.
template <int J>
inline void transpose_rows(const float* acc, int64_t acc_stride, int64_t j0, int64_t r, int64_t count, float scale,
                           bool add, float* G, vd& squares) {
    for (; r - j0 >= J; j0 += J) {
        for (int64_t f = 0; f < count; f += W) {
            vf rows[J];
            float values[J * W];
            for (int j = 0; j < J; ++j) rows[j] = scale * load(acc + (j0 + j) * acc_stride + f);
            interleave<J>(rows);
            for (int j = 0; j < J; ++j) store(values + j * W, rows[j]);
            const int64_t here = at_most(W, count - f);
            for (int64_t i = here * J; i < J * W; ++i) values[i] = 0.0f;
            for (int64_t p = 0; p < here; ++p) {
                float* g = G + (f + p) * r + j0;
                if (add)
                    for (int j = 0; j < J; ++j) values[p * J + j] += g[j];
                memcpy(g, values + p * J, J * sizeof(float));
            }
            for (int j = 0; j < J; ++j) squares = add_squares(squares, load(values + j * W));
        }
    }
    if constexpr (J > 1)
        if (j0 < r) transpose_rows<J / 2>(acc, acc_stride, j0, r, count, scale, add, G, squares);
}

// Returns the squared norm of what now stands in G.
inline double emit_transposed(const float* acc, int64_t acc_stride, int64_t r, int64_t count, float scale, bool add,
                              float* G) {
    vd squares = {};
    transpose_rows<kRows>(acc, acc_stride, 0, r, count, scale, add, G, squares);
    return sum_lanes(squares);
}

// out[f] (+)= scale * in[f]; returns the squared norm of what now stands in out. out may be in.
inline double emit_row(const float* in, int64_t count, float scale, bool add, float* out) {
    vd squares = {};
    int64_t f = 0;
    for (; f + W <= count; f += W) {
        vf g = scale * load(in + f);
        if (add) g += load(out + f);
        store(out + f, g);
        squares = add_squares(squares, g);
    }
    double sum = sum_lanes(squares);
    for (; f < count; ++f) {
        const float g = scale * in[f] + (add ? out[f] : 0.0f);
        out[f] = g;
        sum += (double)g * g;
    }
    return sum;
}

// b (r, stride) = scaling * B^T in float32, padded with zeros; for pairs B^T as it is.
inline void pack_B(const SampleGrad& p, float* b, int64_t stride, bool pairs) {
    if (pairs) {
        const uint16_t* B = (const uint16_t*)p.B.data;
        for (int64_t f = 0; f < p.m; ++f)
            for (int64_t j = 0; j < p.r; ++j)
                ((uint16_t*)b)[j * stride + f] = B[f * p.B.stride0 + j * p.B.stride1];
        return;
    }
#pragma omp parallel for num_threads(p.num_threads) schedule(static) if (p.m * p.r > 16384)
    for (int64_t f0 = 0; f0 < stride; f0 += 64) {
        const int64_t f1 = at_most(stride, f0 + 64);
        for (int64_t j = 0; j < p.r; ++j) {
            float* row = b + j * stride;
            const int64_t whole = at_least(0, at_most(f1, p.m) - f0);
            convert_row(p.B.data, p.B.dtype, f0 * p.B.stride0 + j * p.B.stride1, p.B.stride0, whole, row + f0);
            for (int64_t f = f0; f < f0 + whole; ++f) row[f] *= p.scaling;
            for (int64_t f = f0 + whole; f < f1; ++f) row[f] = 0.0f;
        }
    }
}

// Sum `count` partial projections, `part_stride` apart, in order, into dz32 and, where given, into dz in its dtype.
inline void reduce_dz(const float* parts, int64_t count, int64_t part_stride, int64_t values, float* dz32, void* dz,
                      int32_t dtype) {
    if (parts != dz32)
        for (int64_t v0 = 0; v0 < values; v0 += 1024) {  // a run that stays in L1 while the partials stream by
            const int64_t v1 = at_most(values, v0 + 1024);
            for (int64_t v = v0; v < v1; ++v) dz32[v] = parts[v];
            for (int64_t c = 1; c < count; ++c)
                for (int64_t v = v0; v < v1; ++v) dz32[v] += parts[c * part_stride + v];
        }
    if (dz && dtype == kBFloat16)
        for (int64_t v = 0; v < values; ++v) ((uint16_t*)dz)[v] = to_bfloat16(dz32[v]);
}

LALORA_END
