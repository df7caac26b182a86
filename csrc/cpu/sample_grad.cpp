// sample_grad: tasks are (sample, chunk of features); each reads its part of dy once, projecting a block and taking
// its gradient while it is in L2. With A active the projections come first and x is read once.
#include "sample_grad.h"

LALORA_BEGIN

static void run(const SampleGrad& p) {
    const bool wanted = p.dz || p.sq_A;
    const Chunks by_m = task_chunks(p.m, p.N), by_n = task_chunks(p.n, p.N);
    const int64_t squares_m = p.N * by_m.count, squares_n = p.sq_A ? p.N * by_n.count : 0;
    const Projection z(p, wanted, by_m, p.N, 2 * (squares_m + squares_n));
    double* squares = (double*)z.rest;

    if (wanted || p.sq_B) project_all(p, z, wanted, p.sq_B ? squares : nullptr);
    if (p.sq_A) {
        const Operands o = z.of_A(p);
#pragma omp parallel for num_threads(p.num_threads) schedule(static)
        for (int64_t task = 0; task < squares_n; ++task) {
            const int64_t i = task / by_n.count, begin = task % by_n.count * by_n.size;
            const int64_t end = at_most(p.n, begin + by_n.size);
            float* work = scratch(kWork, work_floats(p.r) + p.r * padded_stride(kFeatures));
            float* acc = work + work_floats(p.r);
            double sum = 0;
            for (int64_t f = begin; f < end; f += kFeatures) {
                const int64_t count = at_most(kFeatures, end - f), stride = padded_stride(count);
                const bool more = f + kFeatures < end, last = task + 1 == squares_n;
                const int64_t next_i = more || last ? i : (task + 1) / by_n.count;
                const int64_t next_f = more ? f + kFeatures : (task + 1) % by_n.count * by_n.size;
                feature_block(o, i, f, count, next_i, next_f, acc, stride, nullptr, false, work);
                for (int64_t j = 0; j < p.r; ++j)
                    sum += emit_row(acc + j * stride, count, 1.0f, p.accumulate,
                                    p.G_A + i * p.G_A_stride + j * p.n + f);
            }
            squares[squares_m + task] = sum;
        }
    }
    for (int64_t i = 0; i < p.N; ++i) {
        double sum_B = 0, sum_A = 0;
        for (int64_t c = 0; c < by_m.count; ++c) sum_B += squares[i * by_m.count + c];
        if (p.sq_B) p.sq_B[i] = sum_B;
        if (!p.sq_A) continue;
        for (int64_t c = 0; c < by_n.count; ++c) sum_A += squares[squares_m + i * by_n.count + c];
        p.sq_A[i] = sum_A;
    }
}

LALORA_END

namespace lalora {
namespace LALORA_ISA {
void sample_grad(const SampleGrad& p) { run(p); }
}  // namespace LALORA_ISA
}  // namespace lalora
