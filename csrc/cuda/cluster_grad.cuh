// The kernel of sample_grad and sample_grad_clip on sm_90: a thread-block cluster takes one sample at a time. Each CTA
// holds a slice of its gradient's features in registers, and of dz the share that its features make. Shares and norms are
// added up over the cluster's shared memory, a span of positions at a time: a barrier of a cluster takes as long as many
// tiles. Then the slice is written out, or scaled and added to the cluster's own sum. Sums run in a fixed order, so
// results repeat bit for bit.
#pragma once
#include <type_traits>

#include "../clip.h"
#include "params.h"
#include "tiles.cuh"

namespace lalora {
namespace cuda {

constexpr int kWarps = 12, kThreads = 32 * kWarps, kMaxCluster = 8;

// NT: columns of 8 that hold the rank; MT: rows of 16 features a warp holds of G, 48 accumulators a thread at most.
template <class T_, int NT_, bool kA_, bool kClip_>
struct Traits {
    using T = T_;
    static constexpr int NT = NT_, MT = 12 / NT_, R = 8 * NT_;
    static constexpr bool kA = kA_, kClip = kClip_, kScaled = kA_ && std::is_same<T_, F16>::value;
    static constexpr int kPad = 16 / (int)sizeof(T_);  // one access width: no two rows of a fragment share banks
    static constexpr int kThin = R + kPad;             // stride of a thin row
    static constexpr int kSlice = 16 * MT * kWarps;    // features a CTA can hold
    static constexpr int kSpan = R < 32 ? 2048 / R : 64;  // positions between two barriers, at most
    static constexpr const char* kOp = kClip ? "sample_grad_clip" : "sample_grad";
};

LALORA_FN int round16(int64_t v) { return (int)((v + 15) / 16 * 16); }
LALORA_FN int slice_of(int64_t features, int cluster) { return round16((features + cluster - 1) / cluster); }

// Offsets into a CTA's shared memory, in bytes.
template <class Tr>
struct Layout {
    int squares, parts, full, shares, halves, factor, stage, stage_bytes, h, total;
    int wide_stride, dy_stride;

    LALORA_FN Layout(int wide_slice, int dy_slice, const ClusterPlan& plan, bool want_z) {
        using T = typename Tr::T;
        wide_stride = wide_slice + Tr::kPad, dy_stride = dy_slice + Tr::kPad;
        const int span = plan.span * Tr::R * (int)sizeof(float);
        squares = 0;                                  // double [2][kMaxCluster] and [kWarps]
        parts = (2 * kMaxCluster + kWarps) * 8;       // float [2][span][R]: this CTA's share of dz
        full = parts + (want_z ? 2 * span : 0);       // A: float [span][R], dz
        shares = full + (Tr::kA ? span : 0);          // float [16 kWarps][R]: the warps' shares of a tile's
        halves = shares + (want_z ? 16 * kWarps * Tr::R * (int)sizeof(float) : 0);  // A: T [2][span][kThin]
        factor = halves + (Tr::kA ? 2 * plan.span * Tr::kThin * (int)sizeof(T) : 0);
        stage = factor + (want_z ? dy_slice * Tr::kThin * (int)sizeof(T) : 0);
        // A stage holds a tile of dy and of h; of A, one of dy or of x.
        h = plan.positions * wide_stride * (int)sizeof(T);
        stage_bytes = Tr::kA ? plan.positions * (dy_stride > wide_stride ? dy_stride : wide_stride) * (int)sizeof(T)
                             : h + plan.positions * Tr::kThin * (int)sizeof(T);
        total = stage + plan.stages * stage_bytes;
    }
};

struct ClusterLaunch {
    LayerGrad g;
    ClusterPlan plan;
};

#if defined(LALORA_EMULATE) || __CUDA_ARCH__ >= 900
// A tile of the walk over samples, spans and positions. A's span is walked twice: dy, then x.
template <bool kA>
struct Cursor {
    int64_t sample;
    int begin, t;
    bool second;

    LALORA_MEMBER int end(const ClusterLaunch& p) const {  // of the span
        const int T = (int)p.g.T;
        return T - begin < p.plan.span ? T : begin + p.plan.span;
    }
    LALORA_MEMBER bool ends_span(const ClusterLaunch& p) const { return t + p.plan.positions >= end(p); }
    LALORA_MEMBER int rows(const ClusterLaunch& p) const {  // of the span's tiles, of which T = 0 has one
        const int span = end(p) - begin, positions = p.plan.positions;
        return span > positions ? (span + positions - 1) & -positions : positions;
    }
    LALORA_MEMBER void advance(const ClusterLaunch& p, int64_t step) {
        if (!ends_span(p)) {
            t += p.plan.positions;
        } else if (kA && !second) {
            second = true, t = begin;
        } else {
            begin = end(p), second = false;
            if (begin >= (int)p.g.T) begin = 0, sample += step;
            t = begin;
        }
    }
};

// Every rank's `part` holds its features' share of a span's dz; the ranks take turns in adding it up.
template <class Tr>
LALORA_DEVICE void reduce_dz(const ClusterLaunch& p, float* part, float* full, const Cursor<Tr::kA>& at) {
    using T = typename Tr::T;
    const LayerGrad& g = p.g;
    const int ranks = (int)cluster_size(), rank = (int)cluster_rank(), rows = at.rows(p);
    for (int e = rank * kThreads + (int)threadIdx.x; e < rows * Tr::R; e += ranks * kThreads) {
        float share[kMaxCluster], sum = 0.0f;
#pragma unroll
        for (int k = 0; k < kMaxCluster; ++k)
            if (k < ranks) share[k] = of_rank(part, k)[e];
#pragma unroll
        for (int k = 0; k < kMaxCluster; ++k)
            if (k < ranks) sum += share[k];
        if (Tr::kA)
            for (int k = 0; k < ranks; ++k) of_rank(full, k)[e] = sum;
        const int t = at.begin + e / Tr::R;
        const int column = e % Tr::R;
        if (g.dz && t < g.T && column < g.r) from_float(sum, static_cast<T*>(g.dz)[(at.sample * g.T + t) * g.r + column]);
    }
}
#endif

template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) cluster_grad_kernel(const ClusterLaunch p) {
#if defined(LALORA_EMULATE) || __CUDA_ARCH__ >= 900
    cluster_arrive();  // until all have, a CTA of the cluster may not have started, and has no shared memory to reach
    using T = typename Tr::T;
    constexpr int NT = Tr::NT, MT = Tr::MT, R = Tr::R;
    const LayerGrad& g = p.g;
    const int positions = p.plan.positions, stages = p.plan.stages;
    const int ranks = (int)cluster_size(), rank = (int)cluster_rank(), warp = warp_of(), lane = lane_of();
    const int64_t features = Tr::kA ? g.n : g.m;
    const int slice = slice_of(features, ranks), dy_slice = slice_of(g.m, ranks);
    const int64_t f0 = (int64_t)rank * slice, m0 = (int64_t)rank * dy_slice;
    const int here = features > f0 ? (int)(features - f0 < slice ? features - f0 : slice) : 0;
    const int dy_here = g.m > m0 ? (int)(g.m - m0 < dy_slice ? g.m - m0 : dy_slice) : 0;
    const bool want_z = Tr::kA || g.dz;
    const Layout<Tr> at(slice, dy_slice, p.plan, want_z);
    unsigned char* shared = shared_memory();
    double* squares = reinterpret_cast<double*>(shared + at.squares);
    double* warp_squares = squares + 2 * kMaxCluster;
    float* part = reinterpret_cast<float*>(shared + at.parts);  // of two in turn, so that one barrier a span is enough
    float* other_part = part + p.plan.span * R;
    float* full = reinterpret_cast<float*>(shared + at.full);
    float* shares = reinterpret_cast<float*>(shared + at.shares);
    T* halves = reinterpret_cast<T*>(shared + at.halves);
    T* factor = reinterpret_cast<T*>(shared + at.factor);

    const int64_t first = cluster_index(), step = cluster_count();
    Cursor<Tr::kA> now = {first, 0, 0, false}, ahead = now;
    int slot = 0, ahead_slot = 0;
    const bool dy_lies = lies_in_vectors<T>(static_cast<const T*>(g.dy) + m0, g.dy_n, g.dy_t, dy_here);
    const bool x_lies = Tr::kA && lies_in_vectors<T>(static_cast<const T*>(g.x) + f0, g.x_n, g.x_t, here);
    const auto fetch = [&]() {
        if (ahead.sample < g.N) {
            const int64_t i = ahead.sample, t = ahead.t;
            const int rows = (int)g.T - ahead.t < positions ? (int)g.T - ahead.t : positions;
            T* to = reinterpret_cast<T*>(shared + at.stage + ahead_slot * at.stage_bytes);
            if (Tr::kA && ahead.second) {
                copy_rows<T, kWarps>(to, at.wide_stride, static_cast<const T*>(g.x) + i * g.x_n + t * g.x_t + f0, g.x_t,
                                     positions, slice, rows, here, x_lies);
            } else {
                copy_rows<T, kWarps>(to, at.dy_stride, static_cast<const T*>(g.dy) + i * g.dy_n + t * g.dy_t + m0,
                                     g.dy_t, positions, dy_slice, rows, dy_here, dy_lies);
                if (!Tr::kA)
                    copy_thin<T, kThreads, R>(reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(to) + at.h),
                                              Tr::kThin, static_cast<const T*>(g.h) + i * g.h_n + t * g.h_t, g.h_t,
                                              positions, rows, (int)g.r);
            }
            ahead.advance(p, step);
            ahead_slot = ahead_slot + 1 == stages ? 0 : ahead_slot + 1;
        }
        copy_commit();
    };
    if (want_z)
        copy_thin<T, kThreads, R>(factor, Tr::kThin, static_cast<const T*>(g.B) + m0 * g.r, g.r, dy_slice, dy_here,
                                  (int)g.r);
    for (int k = 0; k + 1 < stages; ++k) fetch();  // the factor arrives with the first of them
    cluster_wait();  // for the kernel's first line, hidden by the copies

    const int blocks = positions / 16, cuts = kWarps / blocks;  // of dz a warp takes 16 rows, every cuts-th 16 features
    const int mine = slice / 16 > warp ? (slice / 16 - warp + kWarps - 1) / kWarps : 0;  // of G, every kWarps-th 16
    int settled = 0;  // rows of a span whose shares are added up

    float c[MT][NT][4];
    int top = 0;  // kScaled: G is held divided by 2^(top - 14 - 127)
    double* slots = squares;
    for (; now.sample < g.N; now.advance(p, step)) {
        const bool makes_z = want_z && !(Tr::kA && now.second), makes_g = !Tr::kA || now.second;
        if (now.t == 0 && !now.second) {
            top = 0;
#pragma unroll
            for (int j = 0; j < MT; ++j)
#pragma unroll
                for (int k = 0; k < NT; ++k) c[j][k][0] = c[j][k][1] = c[j][k][2] = c[j][k][3] = 0.0f;
        }
        if (stages == 4)
            copy_wait<2>();
        else if (stages == 3)
            copy_wait<1>();
        else
            copy_wait<0>();
        sync_block();  // the tile is here for all, and the buffer of the last one is free
        fetch();
        unsigned char* buffer = shared + at.stage + slot * at.stage_bytes;
        slot = slot + 1 == stages ? 0 : slot + 1;
        const T* wide = reinterpret_cast<const T*>(buffer);

        if (makes_z) {
            constexpr int kColumns = NT == 4 ? 4 : 2;  // of 8, at a time: registers
            [[maybe_unused]] constexpr int kAhead = sizeof(T) == 4 ? 1 : NT == 2 ? 4 : 2;
            float* share = shares + warp / blocks * positions * R + warp % blocks * 16 * R;
            const int k0 = warp / blocks * 16, steps = dy_slice > k0 ? (dy_slice - k0 + 16 * cuts - 1) / (16 * cuts) : 0;
#pragma unroll 1
            for (int column = 0; column < NT; column += kColumns) {
                float z[kColumns][4] = {};
                auto a = View<T>::rows(wide + warp % blocks * 16 * at.dy_stride + k0, at.dy_stride);
                auto b = View<T>::rows(factor + k0 * Tr::kThin + 8 * column, Tr::kThin);
#pragma unroll kAhead
                for (int k = 0; k < steps; ++k) {
                    Thin<T, kColumns> right;
                    right.load(b);
                    right.add_product(z, a);
                    a = a + 16 * cuts, b = b + 16 * cuts * Tr::kThin;
                }
#pragma unroll
                for (int k = 0; k < kColumns; ++k)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        share[(lane / 4 + e / 2 * 8) * R + 8 * (column + k) + lane % 4 * 2 + e % 2] = z[k][e];
            }
        }
        if (makes_g) {
            const T* thin = Tr::kA ? halves + (now.t - now.begin) * Tr::kThin : reinterpret_cast<const T*>(buffer + at.h);
            [[maybe_unused]] constexpr int kTwo = NT == 2 ? 2 : 1;  // registers
            auto left = View<T>::transposed(wide + 16 * warp, at.wide_stride);
            auto right = View<T>::rows(thin, Tr::kThin);
#pragma unroll kTwo
            for (int t = 0; t < positions; t += 16) {
                // dz in two halves: 16 bits of mantissa of bfloat16, 22 of float16. In float32 the first is all.
#pragma unroll
                for (int half = 0; half < (Tr::kA && sizeof(T) == 2 ? 2 : 1); ++half) {
                    Thin<T, NT> b;
                    b.load(right + half * p.plan.span * Tr::kThin);
                    b.add_transposed(c, left, 16 * kWarps, mine);
                }
                left = left + 16 * at.wide_stride, right = right + 16 * Tr::kThin;
            }
        }
        if (makes_z) {
            sync_block();
            for (int e = threadIdx.x; e < positions * R; e += kThreads) {
                float sum = 0.0f;
#pragma unroll 4
                for (int k = 0; k < cuts; ++k) sum += shares[k * positions * R + e];
                part[settled * R + e] = g.scaling * sum;
            }
            settled += positions;
        }
        if (!now.ends_span(p)) continue;

        const bool ends_sample = makes_g && now.end(p) >= g.T;
        if (makes_z && !ends_sample) {
            cluster_arrive();
            cluster_wait();
            reduce_dz<Tr>(p, part, full, now);
            float* const reduced = part;
            part = other_part, other_part = reduced, settled = 0;
        }
        if (Tr::kA && !now.second) {
            cluster_arrive();
            cluster_wait();
            const int rows = now.rows(p);
            if (Tr::kScaled) {
                // float16 has not float32's range: a power of two brings the largest value to 2^14.
                float largest = 0.0f;
                for (int e = lane; e < rows * R; e += 32) largest = fmaxf(largest, fabsf(full[e]));
                int high = ScalarOps::bits(warp_max(largest)) >> 23;
                high = high < 15 ? 15 : high > 254 ? 254 : high;
                high = high < top ? top : high;
                const int lower = top && high - top < 127 ? 127 - (high - top) : 0;
                if (high != top) {
                    const float down = ScalarOps::from_bits(lower << 23);
#pragma unroll
                    for (int j = 0; j < MT; ++j)
#pragma unroll
                        for (int k = 0; k < NT; ++k)
#pragma unroll
                            for (int e = 0; e < 4; ++e) c[j][k][e] *= down;
                }
                top = high;
            }
            const float up = Tr::kScaled ? ScalarOps::from_bits((268 - top) << 23) : 1.0f;
            for (int e = threadIdx.x; e < rows * R; e += kThreads) {
                const int to = e / R * Tr::kThin + e % R;
                T high, low;
                from_float(up * full[e], high);
                from_float(up * full[e] - to_float(high), low);
                halves[to] = high, halves[p.plan.span * Tr::kThin + to] = low;
            }
        }
        if (!ends_sample) continue;

        // Lane's first element; B's are r apart from one feature to the next, A's lie side by side.
        const int64_t next_f = Tr::kA ? 1 : g.r, next_r = Tr::kA ? features : 1;
        const int f_first = 16 * warp + lane / 4, r_first = lane % 4 * 2;
        const int64_t corner = (f0 + f_first) * next_f + r_first * next_r;
        const auto each = [&](float* to, const auto& visit) {
#pragma unroll
            for (int j = 0; j < MT; ++j) {
                if (j >= mine) break;
#pragma unroll
                for (int k = 0; k < NT; ++k)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int f = 16 * kWarps * j + e / 2 * 8, column = 8 * k + e % 2;
                        if (f_first + f < here && r_first + column < g.r)
                            visit(to[e / 2 * 8 * next_f + column * next_r], c[j][k][e]);
                    }
                to += 16 * kWarps * next_f;
            }
        };
        const float scale = Tr::kScaled ? ScalarOps::from_bits((top - 14) << 23) : Tr::kA ? 1.0f : g.scaling;
#pragma unroll
        for (int j = 0; j < MT; ++j)
#pragma unroll
            for (int k = 0; k < NT; ++k)
#pragma unroll
                for (int e = 0; e < 4; ++e) c[j][k][e] *= scale;
        float* out = Tr::kClip ? nullptr : g.G + now.sample * g.G_n + corner;
        if (!Tr::kClip && g.accumulate) each(out, [](const float& to, float& v) { v += to; });
        double square = 0.0;
#pragma unroll
        for (int j = 0; j < MT; ++j)
#pragma unroll
            for (int k = 0; k < NT; ++k)
#pragma unroll
                for (int e = 0; e < 4; ++e) square += (double)c[j][k][e] * c[j][k][e];
        square = warp_sum(square);
        if (lane == 0) warp_squares[warp] = square;
        sync_block();
        if ((int)threadIdx.x < ranks) {
            double sum = 0.0;
            for (int k = 0; k < kWarps; ++k) sum += warp_squares[k];
            of_rank(slots, threadIdx.x)[rank] = sum;
        }
        cluster_arrive();
        if (!Tr::kClip) each(out, [](float& to, const float& v) { to = v; });  // behind the barrier's fence
        cluster_wait();
        double total = 0.0;
        for (int k = 0; k < ranks; ++k) total += slots[k];
        slots = slots == squares ? squares + kMaxCluster : squares;
        if (rank == 0 && threadIdx.x == 0) g.sq[now.sample] = total;
        if (makes_z) {
            reduce_dz<Tr>(p, part, full, now);
            float* const reduced = part;
            part = other_part, other_part = reduced, settled = 0;
        }
        if (Tr::kClip) {
            const float weight = now.sample < g.valid ? (float)clip_factor(total, g.max_norm, g.grad_scale) : 0.0f;
            const bool fresh = now.sample == first;
            each(g.partial + first * features * g.r + corner, [&](float& to, const float& v) {
                const float add = weight != 0.0f ? weight * v : 0.0f;  // 0 * Inf must not leak
                to = fresh ? add : to + add;
            });
        }
    }
    copy_wait<0>();
    cluster_arrive();
    cluster_wait();  // others may still read this CTA's shared memory
#endif
}

}  // namespace cuda
}  // namespace lalora
