#pragma once
#include "grad.h"

LALORA_BEGIN

// Where a call keeps b, the partial projections and the float32 dz, all in the shared scratch.
struct Projection {
    Chunks chunks;
    int64_t b_stride;
    bool pairs;
    float *b, *parts, *dz32;
    float* rest;  // `extra` floats more

    Projection(const SampleGrad& p, bool wanted, Chunks c, int64_t samples_at_once, int64_t extra) : chunks(c) {
        const int64_t values = p.T * p.r;
        const bool own = wanted && !(p.dz && p.dy.dtype == kFloat32);
        const bool split = wanted && chunks.count > 1;
        b_stride = padded_stride(p.m);
        const int64_t b_floats = wanted ? round_up(p.r * b_stride, 16) : 0;
        const int64_t part_floats = split ? round_up(samples_at_once * chunks.count * values, 16) : 0;
        const int64_t dz_floats = own ? round_up(p.N * values, 16) : 0;
        b = scratch(kShared, b_floats + part_floats + dz_floats + extra);
        dz32 = own ? b + b_floats + part_floats : (float*)p.dz;
        parts = split ? b + b_floats : dz32;
        rest = b + b_floats + part_floats + dz_floats;
        pairs = takes_pairs(p);
        if (wanted) pack_B(p, b, b_stride, pairs);
    }

    Operands of_B(const SampleGrad& p) const { return {p.dy, p.h, p.T, p.r, b, b_stride, pairs, p.scaling}; }
    Operands of_A(const SampleGrad& p) const {
        return {p.x, {dz32, p.T * p.r, p.r, 1, kFloat32}, p.T, p.r, nullptr, 0, false, 1.0f};
    }
};

// Tasks are (sample, chunk): at least 16 of them where the shape allows it.
inline Chunks task_chunks(int64_t features, int64_t N) {
    return split(features, N > 0 ? (16 + N - 1) / N : 1, 12 * 3 * W);
}

// dz of every sample and, with `squares` (N, chunks), each sample's G_B: dy is read once.
inline void project_all(const SampleGrad& p, const Projection& z, bool wanted, double* squares) {
    const Operands o = z.of_B(p);
    const int64_t values = p.T * p.r;
#pragma omp parallel for num_threads(p.num_threads) schedule(static)
    for (int64_t task = 0; task < p.N * z.chunks.count; ++task) {
        const int64_t i = task / z.chunks.count, begin = task % z.chunks.count * z.chunks.size;
        const int64_t end = at_most(p.m, begin + z.chunks.size);
        float* work = scratch(kWork, work_floats(p.r) + p.r * padded_stride(kFeatures));
        float* acc = squares ? work + work_floats(p.r) : nullptr;
        float* dz = wanted ? z.parts + task * values : nullptr;
        double sum = 0;
        for (int64_t f = begin; f < end; f += kFeatures) {
            const int64_t count = at_most(kFeatures, end - f), stride = padded_stride(count);
            const bool more = f + kFeatures < end, last = task + 1 == p.N * z.chunks.count;
            const int64_t next_i = more || last ? i : (task + 1) / z.chunks.count;
            const int64_t next_f = more ? f + kFeatures : (task + 1) % z.chunks.count * z.chunks.size;
            feature_block(o, i, f, count, next_i, next_f, acc, stride, dz, f > begin, work);
            if (acc)
                sum += emit_transposed(acc, stride, p.r, count, p.scaling, p.accumulate,
                                       p.G_B + i * p.G_B_stride + f * p.r);
        }
        if (squares) squares[task] = sum;
    }
    if (!wanted || (z.parts == z.dz32 && p.dy.dtype == kFloat32)) return;
#pragma omp parallel for num_threads(p.num_threads) schedule(static)
    for (int64_t i = 0; i < p.N; ++i)
        reduce_dz(z.parts + i * z.chunks.count * values, z.chunks.count, values, values, z.dz32 + i * values,
                  p.dz ? (uint16_t*)p.dz + i * values : nullptr, p.dy.dtype);
}

LALORA_END
