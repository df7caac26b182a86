// sample_grad_clip: a few samples at a time, as many as have gradients that fit the cache together (one, where a single
// one is that large). All threads share their chunks of features, meet, and share the clipped sum; a gradient that has
// been added is overwritten by a later sample's and never reaches memory.
#include "../clip.h"
#include "sample_grad.h"

LALORA_BEGIN

constexpr int64_t kGroupFloats = 262144;  // of gradients at a time

struct Factor {
    Operands o;
    int64_t features;
    float scale;
    bool transposed;  // S (features, r) and not (r, features)
    float* S;
    double* sq;
};

struct Plan {
    int64_t group;   // samples at a time
    Chunks chunks;   // of features, for the gradients
    Chunks columns;  // of features, for the sum
    int64_t width;   // of a row of gradients

    Plan(int64_t features, int64_t r, int64_t N)
        : group(at_least(1, at_most(N, kGroupFloats / (r * at_least(features, 1))))),
          chunks(split(features, (16 + group - 1) / group, 512 / (kTile * W) * kTile * W)),
          columns(split(features, 16, kTile * W)),
          width(round_up(features, W)) {}
    int64_t floats(int64_t r) const { return (group + 1) * r * width + round_up(2 * group * chunks.count, 16); }
};

static void clipped_sum(const SampleGradClip& q, const Factor& f, const Plan& plan, const Projection& z, bool with_dz) {
    const SampleGrad& p = q.grad;
    const Chunks c = plan.chunks;
    const int64_t r = p.r, width = plan.width, values = p.T * r;
    double* squares = (double*)z.rest;                                  // (group, chunks)
    float* G = z.rest + round_up(2 * plan.group * c.count, 16);         // (group, r, width)
    float* S = f.transposed ? G + plan.group * r * width : f.S;         // (r, width) or (r, features)
    const int64_t S_stride = f.transposed ? width : f.features;
    if (f.transposed) memset(S, 0, r * width * sizeof(float));

#pragma omp parallel num_threads(p.num_threads)
    {
        float* work = scratch(kWork, work_floats(r));
        for (int64_t i0 = 0; i0 < p.N; i0 += plan.group) {
            const int64_t here = at_most(plan.group, p.N - i0);
#pragma omp for schedule(static)
            for (int64_t task = 0; task < here * c.count; ++task) {
                const int64_t i = task / c.count, begin = task % c.count * c.size;
                const int64_t end = at_most(f.features, begin + c.size);
                float* acc = G + i * r * width + begin;
                float* dz = nullptr;
                if (with_dz) dz = z.parts + (z.parts == z.dz32 ? i0 + i : task) * values;
                for (int64_t b = begin; b < end; b += kFeatures) {
                    const bool more = b + kFeatures < end, last = task + 1 == here * c.count;
                    const int64_t next_i = i0 + (more || last ? i : (task + 1) / c.count);
                    const int64_t next_b = more ? b + kFeatures : (task + 1) % c.count * c.size;
                    feature_block(f.o, i0 + i, b, at_most(kFeatures, end - b), next_i, next_b, acc + (b - begin), width,
                                  dz, b > begin, work);
                }
                double sum = 0;
                for (int64_t j = 0; j < r; ++j)
                    sum += emit_row(acc + j * width, end - begin, f.scale, false, acc + j * width);
                squares[task] = sum;
            }
#pragma omp for schedule(static) nowait
            for (int64_t k = 0; k < plan.columns.count; ++k) {
                const int64_t begin = k * plan.columns.size, end = at_most(f.features, begin + plan.columns.size);
                for (int64_t i = 0; i < here; ++i) {
                    double sq = 0;
                    for (int64_t part = 0; part < c.count; ++part) sq += squares[i * c.count + part];
                    if (k == 0) f.sq[i0 + i] = sq;
                    const float factor = i0 + i < q.valid ? (float)clip_factor(sq, q.max_norm, q.grad_scale) : 0.0f;
                    if (factor == 0.0f) continue;
                    for (int64_t j = 0; j < r; ++j)
                        emit_row(G + (i * r + j) * width + begin, end - begin, factor, true, S + j * S_stride + begin);
                }
            }
            if (with_dz && (z.parts != z.dz32 || p.dy.dtype == kBFloat16)) {
                const int64_t run = 1024, runs = (values + run - 1) / run;
#pragma omp for schedule(static) nowait
                for (int64_t task = 0; task < here * runs; ++task) {
                    const int64_t i = task / runs, v0 = task % runs * run, v = at_most(run, values - v0);
                    const int64_t offset = (i0 + i) * values + v0;
                    const float* parts = z.parts == z.dz32 ? z.dz32 + offset : z.parts + i * c.count * values + v0;
                    reduce_dz(parts, c.count, values, v, z.dz32 + offset,
                              p.dz ? (uint16_t*)p.dz + offset : nullptr, p.dy.dtype);
                }
            }
#pragma omp barrier
        }
        if (f.transposed) {
#pragma omp for schedule(static)
            for (int64_t k = 0; k < plan.columns.count; ++k) {
                const int64_t begin = k * plan.columns.size, end = at_most(f.features, begin + plan.columns.size);
                emit_transposed(S + begin, width, r, end - begin, 1.0f, true, f.S + begin * r);
            }
        }
    }
}

static void run(const SampleGradClip& q) {
    const SampleGrad& p = q.grad;
    const bool wanted = p.dz || p.sq_A;
    const Plan by_m(p.m, p.r, p.N), by_n(p.n, p.r, p.N);
    const int64_t extra = at_least(p.sq_B ? by_m.floats(p.r) : 0, p.sq_A ? by_n.floats(p.r) : 0);
    const Projection z(p, wanted, p.sq_B ? by_m.chunks : task_chunks(p.m, p.N), p.sq_B ? by_m.group : p.N, extra);

    if (p.sq_B) {
        const Factor B = {z.of_B(p), p.m, p.scaling, true, q.S_B, p.sq_B};
        clipped_sum(q, B, by_m, z, wanted);
    } else if (wanted) {
        project_all(p, z, true, nullptr);
    }
    if (p.sq_A) {
        const Factor A = {z.of_A(p), p.n, 1.0f, false, q.S_A, p.sq_A};
        clipped_sum(q, A, by_n, z, false);
    }
}

LALORA_END

namespace lalora {
namespace LALORA_ISA {
void sample_grad_clip(const SampleGradClip& q) { run(q); }
}  // namespace LALORA_ISA
}  // namespace lalora
