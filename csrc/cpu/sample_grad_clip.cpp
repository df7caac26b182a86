// sample_grad_clip: samples go by one after another (or a few, where they are small) and all threads share a sample's
// chunks of features. Its gradient stays in L2 between the norm and the clipped sum and never reaches memory.
#include "../clip.h"
#include "sample_grad.h"

LALORA_BEGIN

constexpr int64_t kGroupFloats = 65536;  // gradients of the samples that go by together

struct Factor {
    Operands o;
    int64_t features;
    float scale;
    bool transposed;  // S (features, r) and not (r, features)
    float* S;
    double* sq;
};

static Chunks clip_chunks(int64_t features) { return split(features, 16, 4 * 3 * W); }

static int64_t group_size(int64_t features, int64_t r, int64_t N) {
    const Chunks c = clip_chunks(features);
    return at_least(1, at_most(N, kGroupFloats / (r * c.count * c.size)));
}

// Floats of `rest` that `clipped_sum` needs.
static int64_t clip_floats(int64_t features, int64_t r, int64_t N) {
    const Chunks c = clip_chunks(features);
    const int64_t group = group_size(features, r, N);
    return (group + 1) * r * c.count * c.size + 2 * group * c.count + 32;
}

static void clipped_sum(const SampleGradClip& q, const Factor& f, const Projection& z, bool with_dz, float* rest) {
    const SampleGrad& p = q.grad;
    const Chunks c = clip_chunks(f.features);
    const int64_t r = p.r, width = c.count * c.size, group = group_size(f.features, r, p.N), values = p.T * r;
    double* squares = (double*)rest;                                  // (group, chunks)
    float* G = rest + round_up(2 * group * c.count, 16);              // (group, r, width)
    float* S = f.transposed ? G + group * r * width : f.S;            // (r, width) or (r, features)
    const int64_t S_stride = f.transposed ? width : f.features;
    if (f.transposed) memset(S, 0, r * width * sizeof(float));

#pragma omp parallel num_threads(p.num_threads)
    {
        float* work = scratch(kWork, work_floats(r));
        for (int64_t i0 = 0; i0 < p.N; i0 += group) {
            const int64_t here = at_most(group, p.N - i0);
#pragma omp for schedule(static)
            for (int64_t k = 0; k < c.count; ++k) {
                const int64_t begin = k * c.size, end = at_most(f.features, begin + c.size);
                for (int64_t i = 0; i < here; ++i) {
                    float* acc = G + i * r * width + begin;
                    float* dz = nullptr;
                    if (with_dz)
                        dz = z.parts == z.dz32 ? z.dz32 + (i0 + i) * values : z.parts + (i * c.count + k) * values;
                    for (int64_t b = begin; b < end; b += kFeatures)
                        feature_block(f.o, i0 + i, b, at_most(kFeatures, end - b), i0 + i + (i0 + i + 1 < p.N), begin, acc + (b - begin), width, dz,
                                      b > begin, work);
                    double sum = 0;
                    for (int64_t j = 0; j < r; ++j)
                        sum += emit_row(acc + j * width, end - begin, f.scale, false, acc + j * width);
                    squares[i * c.count + k] = sum;
                }
            }
            // The same static schedule: a thread finds its chunks in its own cache.
#pragma omp for schedule(static) nowait
            for (int64_t k = 0; k < c.count; ++k) {
                const int64_t begin = k * c.size, end = at_most(f.features, begin + c.size);
                for (int64_t i = 0; i < here; ++i) {
                    double sq = 0;
                    for (int64_t other = 0; other < c.count; ++other) sq += squares[i * c.count + other];
                    if (k == 0) f.sq[i0 + i] = sq;
                    const float factor = i0 + i < q.valid ? (float)clip_factor(sq, q.max_norm, q.grad_scale) : 0.0f;
                    if (factor == 0.0f) continue;
                    for (int64_t j = 0; j < r; ++j) {
                        const float* g = G + (i * r + j) * width + begin;
                        float* s = S + j * S_stride + begin;
                        for (int64_t e = 0; e < end - begin; ++e) s[e] += factor * g[e];
                    }
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
            for (int64_t k = 0; k < c.count; ++k) {
                const int64_t begin = k * c.size, end = at_most(f.features, begin + c.size);
                emit_transposed(S + begin, width, r, end - begin, 1.0f, true, f.S + begin * r);
            }
        }
    }
}

static void run(const SampleGradClip& q) {
    const SampleGrad& p = q.grad;
    const bool wanted = p.dz || p.sq_A;
    const int64_t group = group_size(p.m, p.r, p.N);
    const int64_t extra = at_least(clip_floats(p.m, p.r, p.N), p.sq_A ? clip_floats(p.n, p.r, p.N) : 0);
    const Projection z(p, wanted, p.sq_B ? clip_chunks(p.m) : task_chunks(p.m, p.N), p.sq_B ? group : p.N, extra);

    if (p.sq_B) {
        const Factor B = {{p.dy, p.h, p.T, p.r, z.b, z.b_stride}, p.m, p.scaling, true, q.S_B, p.sq_B};
        clipped_sum(q, B, z, wanted, z.rest);
    } else if (wanted) {
        project_all(p, z, true, nullptr);
    }
    if (p.sq_A) {
        const Factor A = {{p.x, z.rows(p), p.T, p.r, nullptr, 0}, p.n, 1.0f, false, q.S_A, p.sq_A};
        clipped_sum(q, A, z, false, z.rest);
    }
}

LALORA_END

namespace lalora {
namespace LALORA_ISA {
void sample_grad_clip(const SampleGradClip& q) { run(q); }
}  // namespace LALORA_ISA
}  // namespace lalora
