// sample_grad_clip on sm_90: a thread-block cluster takes one sample at a time. Each CTA holds a slice of its gradient's
// features in registers; dz and the norm are added up over the cluster's shared memory, the slice is scaled and added to
// the cluster's own sum. The gradient is never written out. Sums run in a fixed order, so results repeat bit for bit.
#include <type_traits>

#include "../clip.h"
#include "params.h"
#include "tiles.cuh"

namespace lalora {
namespace cuda {

constexpr const char* kOp = "sample_grad_clip";
constexpr int kWarps = 8, kThreads = 32 * kWarps, kMaxCluster = 8;

// NT: columns of 8 that hold the rank; MT: rows of 16 features a warp holds of G, 128 accumulators a thread at most.
template <class T_, int NT_, bool kA_>
struct Traits {
    using T = T_;
    static constexpr int NT = NT_, MT = 32 / NT_, R = 8 * NT_;
    static constexpr bool kA = kA_, kScaled = kA_ && std::is_same<T_, F16>::value;
    static constexpr int kPad = 16 / (int)sizeof(T_);  // one access width: no two rows of a fragment share banks
    static constexpr int kThin = R + kPad;             // stride of a thin row
    static constexpr int kSlice = 16 * MT * kWarps;    // features a CTA can hold
};

LALORA_FN int round16(int64_t v) { return (int)((v + 15) / 16 * 16); }
LALORA_FN int slice_of(int64_t features, int cluster) { return round16((features + cluster - 1) / cluster); }

// Offsets into a CTA's shared memory, in bytes. The copies that ranks read of each other come first.
template <class Tr>
struct Layout {
    int squares, parts, full, warps, halves, factor, stage, stage_bytes, h, dy, total;
    int wide_stride, dy_stride;

    LALORA_FN Layout(int wide_slice, int dy_slice, int positions, int stages, bool want_z) {
        using T = typename Tr::T;
        wide_stride = wide_slice + Tr::kPad, dy_stride = dy_slice + Tr::kPad;
        const int tile = positions * Tr::R * (int)sizeof(float);
        squares = 0;                                          // double [2][kMaxCluster] and [kWarps]
        parts = (2 * kMaxCluster + kWarps) * 8;               // float [2][positions][R]: this CTA's share of dz
        full = parts + (want_z ? 2 * tile : 0);               // A: float [positions][R], dz
        warps = full + (Tr::kA ? tile : 0);                   // float [16 kWarps][R]: the warps' shares of dz
        halves = warps + (want_z ? 16 * kWarps * Tr::R * (int)sizeof(float) : 0);  // A: T [2][positions][kThin]
        factor = halves + (Tr::kA ? 2 * positions * Tr::kThin * (int)sizeof(T) : 0);
        stage = factor + (want_z ? dy_slice * Tr::kThin * (int)sizeof(T) : 0);
        h = positions * wide_stride * (int)sizeof(T);  // inside a stage: wide; then h, or A's dy
        dy = Tr::kA ? h : 0;                           // B: dy is the wide one
        stage_bytes = h + (Tr::kA ? positions * dy_stride : positions * Tr::kThin) * (int)sizeof(T);
        total = stage + stages * stage_bytes;
    }
};

struct ClipLaunch {
    ClipGrad g;
    ClipPlan plan;
};

#if defined(LALORA_EMULATE) || __CUDA_ARCH__ >= 900
// Every rank's `parts` holds its features' share of a tile's dz. Rank c adds up the tile's rows that are its own.
template <class Tr>
LALORA_DEVICE void reduce_dz(const ClipGrad& g, float* parts, float* full, int positions, int64_t i, int64_t t0) {
    using T = typename Tr::T;
    const int ranks = (int)cluster_size(), rank = (int)cluster_rank(), rows = positions / ranks;
    for (int e = threadIdx.x; e < rows * Tr::R; e += kThreads) {
        const int at = rank * rows * Tr::R + e, row = at / Tr::R, column = at % Tr::R;
        float sum = 0.0f;
        for (int k = 0; k < ranks; ++k) sum += of_rank(parts, k)[at];
        if (Tr::kA)
            for (int k = 0; k < ranks; ++k) of_rank(full, k)[at] = sum;
        if (g.dz && t0 + row < g.T && column < g.r)
            from_float(sum, static_cast<T*>(g.dz)[(i * g.T + t0 + row) * g.r + column]);
    }
}

#endif

template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) sample_grad_clip_kernel(const ClipLaunch p) {
#if defined(LALORA_EMULATE) || __CUDA_ARCH__ >= 900
    cluster_arrive();  // until all have, a CTA of the cluster may not have started, and has no shared memory to reach
    using T = typename Tr::T;
    constexpr int NT = Tr::NT, MT = Tr::MT;
    const ClipGrad& g = p.g;
    const int positions = p.plan.positions, stages = p.plan.stages;
    const int ranks = (int)cluster_size(), rank = (int)cluster_rank(), warp = warp_of(), lane = lane_of();
    const int64_t features = Tr::kA ? g.n : g.m;
    const int slice = slice_of(features, ranks), dy_slice = slice_of(g.m, ranks);
    const int64_t f0 = (int64_t)rank * slice, m0 = (int64_t)rank * dy_slice;
    const int here = features > f0 ? (int)(features - f0 < slice ? features - f0 : slice) : 0;
    const int dy_here = g.m > m0 ? (int)(g.m - m0 < dy_slice ? g.m - m0 : dy_slice) : 0;
    const bool want_z = Tr::kA || g.dz;
    const Layout<Tr> at(slice, dy_slice, positions, stages, want_z);
    unsigned char* shared = shared_memory();
    double* squares = reinterpret_cast<double*>(shared + at.squares);
    double* warp_squares = squares + 2 * kMaxCluster;
    float* parts = reinterpret_cast<float*>(shared + at.parts);
    float* full = reinterpret_cast<float*>(shared + at.full);
    float* shares = reinterpret_cast<float*>(shared + at.warps);
    T* halves = reinterpret_cast<T*>(shared + at.halves);
    T* factor = reinterpret_cast<T*>(shared + at.factor);

    const int64_t first = cluster_index(), step = cluster_count();
    const int64_t tiles = g.T ? (g.T + positions - 1) / positions : 1;  // T = 0 too has a gradient, of zeros
    const int64_t samples = g.N > first ? (g.N - first + step - 1) / step : 0, work = samples * tiles;

    const auto fetch = [&](int64_t w) {
        if (w < work) {
            const int64_t i = first + w / tiles * step, t0 = w % tiles * positions;
            const int rows = (int)(g.T - t0 < positions ? g.T - t0 : positions);
            unsigned char* to = shared + at.stage + (int)(w % stages) * at.stage_bytes;
            const T* dy = static_cast<const T*>(g.dy) + i * g.dy_n + t0 * g.dy_t + m0;
            copy_rows<T, kWarps>(reinterpret_cast<T*>(to + at.dy), at.dy_stride, dy, g.dy_t, positions, dy_slice, rows,
                                   dy_here);
            if (Tr::kA)
                copy_rows<T, kWarps>(reinterpret_cast<T*>(to), at.wide_stride,
                                       static_cast<const T*>(g.x) + i * g.x_n + t0 * g.x_t + f0, g.x_t, positions, slice,
                                       rows, here);
            else
                copy_rows<T, kWarps>(reinterpret_cast<T*>(to + at.h), Tr::kThin,
                                       static_cast<const T*>(g.h) + i * g.h_n + t0 * g.h_t, g.h_t, positions, Tr::R,
                                       rows, (int)g.r);
        }
        copy_commit();
    };
    if (want_z)
        copy_rows<T, kWarps>(factor, Tr::kThin, static_cast<const T*>(g.B) + m0 * g.r, g.r, dy_slice, Tr::R, dy_here,
                               (int)g.r);
    for (int w = 0; w + 1 < stages; ++w) fetch(w);  // the factor arrives with the first of them
    cluster_wait();  // for the kernel's first line, hidden by the copies

    float c[MT][NT][4];
    int top = 0;  // kScaled: G is held divided by 2^(top - 14 - 127)
    for (int64_t w = 0; w < work; ++w) {
        const int64_t i = first + w / tiles * step, t0 = w % tiles * positions;
        if (t0 == 0) {
            top = 0;
#pragma unroll
            for (int j = 0; j < MT; ++j)
#pragma unroll
                for (int k = 0; k < NT; ++k) c[j][k][0] = c[j][k][1] = c[j][k][2] = c[j][k][3] = 0.0f;
        }
        if (stages == 3)
            copy_wait<1>();
        else
            copy_wait<0>();
        sync_block();  // the tile is here for all, and the buffer of the last one is free
        fetch(w + stages - 1);
        unsigned char* buffer = shared + at.stage + (int)(w % stages) * at.stage_bytes;
        const T* wide = reinterpret_cast<const T*>(buffer);
        const T* thin = reinterpret_cast<const T*>(buffer + at.h);

        float* part = parts + (w & 1) * positions * Tr::R;  // two, so that one barrier a tile is enough
        if (want_z) {
            const T* dy = reinterpret_cast<const T*>(buffer + at.dy);
            const int blocks = positions / 16, cuts = kWarps / blocks;  // a warp: 16 rows, every cuts-th 16 features
            constexpr int kColumns = NT < 4 ? NT : 4;  // of 8, at a time: registers
            float* mine = shares + warp / blocks * positions * Tr::R + warp % blocks * 16 * Tr::R;
#pragma unroll 1
            for (int column = 0; column < NT; column += kColumns) {
                float z[kColumns][4] = {};
#pragma unroll 1
                for (int k = warp / blocks * 16; k < dy_slice; k += 16 * cuts) {
                    Thin<T, kColumns> b;
                    b.load(factor + k * Tr::kThin + 8 * column, Tr::kThin);
                    b.add_product(z, dy + warp % blocks * 16 * at.dy_stride + k, at.dy_stride);
                }
#pragma unroll
                for (int k = 0; k < kColumns; ++k)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        mine[(lane / 4 + e / 2 * 8) * Tr::R + 8 * (column + k) + lane % 4 * 2 + e % 2] = z[k][e];
            }
            sync_block();
            for (int e = threadIdx.x; e < positions * Tr::R; e += kThreads) {
                float sum = 0.0f;
                for (int k = 0; k < cuts; ++k) sum += shares[k * positions * Tr::R + e];
                part[e] = g.scaling * sum;
            }
            cluster_arrive();
            if (Tr::kA) {
                cluster_wait();
                reduce_dz<Tr>(g, part, full, positions, i, t0);
                cluster_arrive();
                cluster_wait();
                if (Tr::kScaled) {
                    // float16 has not float32's range: a power of two brings the largest value to 2^14.
                    float largest = 0.0f;
                    for (int e = threadIdx.x % 32; e < positions * Tr::R; e += 32) largest = fmaxf(largest, fabsf(full[e]));
                    int now = ScalarOps::bits(warp_max(largest)) >> 23;
                    now = now < 15 ? 15 : now > 254 ? 254 : now;
                    now = now < top ? top : now;
                    const int lower = top && now - top < 127 ? 127 - (now - top) : 0;
                    if (now != top) {
                        const float down = ScalarOps::from_bits(lower << 23);
#pragma unroll
                        for (int j = 0; j < MT; ++j)
#pragma unroll
                            for (int k = 0; k < NT; ++k)
#pragma unroll
                                for (int e = 0; e < 4; ++e) c[j][k][e] *= down;
                    }
                    top = now;
                }
                const float up = Tr::kScaled ? ScalarOps::from_bits((268 - top) << 23) : 1.0f;
                for (int e = threadIdx.x; e < positions * Tr::R; e += kThreads) {
                    const int to = e / Tr::R * Tr::kThin + e % Tr::R;
                    T high, low;
                    from_float(up * full[e], high);
                    from_float(up * full[e] - to_float(high), low);
                    halves[to] = high, halves[positions * Tr::kThin + to] = low;
                }
                sync_block();
            }
        }
        for (int t = 0; t < positions; t += 16) {
            // dz in two halves: 16 bits of mantissa of bfloat16, 22 of float16. In float32 the first is all.
#pragma unroll 1
            for (int half = 0; half < (Tr::kA && sizeof(T) == 2 ? 2 : 1); ++half) {
                Thin<T, NT> b;
                b.load((Tr::kA ? halves + half * positions * Tr::kThin : thin) + t * Tr::kThin, Tr::kThin);
#pragma unroll
                for (int j = 0; j < MT; ++j) {
                    const int f = 16 * (warp + kWarps * j);
                    if (f < slice) b.add_transposed(c[j], wide + t * at.wide_stride + f, at.wide_stride);
                }
            }
        }
        if (want_z && !Tr::kA) {
            cluster_wait();
            reduce_dz<Tr>(g, part, full, positions, i, t0);
        }
        if (t0 + positions < g.T) continue;

        const float scale = Tr::kScaled ? ScalarOps::from_bits((top - 14) << 23) : Tr::kA ? 1.0f : g.scaling;
        double square = 0.0;
#pragma unroll
        for (int j = 0; j < MT; ++j)
#pragma unroll
            for (int k = 0; k < NT; ++k)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    c[j][k][e] *= scale;
                    square += (double)c[j][k][e] * c[j][k][e];
                }
        square = warp_sum(square);
        if (lane == 0) warp_squares[warp] = square;
        sync_block();
        double* slots = squares + (w / tiles & 1) * kMaxCluster;
        if ((int)threadIdx.x < ranks) {
            double sum = 0.0;
            for (int k = 0; k < kWarps; ++k) sum += warp_squares[k];
            of_rank(slots, threadIdx.x)[rank] = sum;
        }
        cluster_arrive();
        cluster_wait();  // the last reach into another CTA's shared memory lies before it: this one may leave
        double total = 0.0;
        for (int k = 0; k < ranks; ++k) total += slots[k];
        if (rank == 0 && threadIdx.x == 0) g.sq[i] = total;
        const float weight = i < g.valid ? (float)clip_factor(total, g.max_norm, g.grad_scale) : 0.0f;

        // Lane's first element; B's are r apart from one feature to the next, A's lie side by side.
        const int64_t next_f = Tr::kA ? 1 : g.r, next_r = Tr::kA ? features : 1;
        const int f_first = 16 * warp + lane / 4, r_first = lane % 4 * 2;
        float* sum = g.partial + first * features * g.r + (f0 + f_first) * next_f + r_first * next_r;
        const bool fresh = i == first;
#pragma unroll
        for (int j = 0; j < MT; ++j) {
#pragma unroll
            for (int k = 0; k < NT; ++k)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int f = 16 * kWarps * j + e / 2 * 8, column = 8 * k + e % 2;
                    if (f_first + f >= here || r_first + column >= g.r) continue;
                    float* to = sum + e / 2 * 8 * next_f + column * next_r;
                    const float add = weight != 0.0f ? weight * c[j][k][e] : 0.0f;  // 0 * Inf must not leak
                    *to = fresh ? add : *to + add;
                }
            sum += 16 * kWarps * next_f;
        }
    }
    copy_wait<0>();
#endif
}

__global__ void __launch_bounds__(kThreads) add_partials_kernel(const ClipLaunch p) {
    const int64_t size = (p.g.is_A ? p.g.n : p.g.m) * p.g.r;
    for (int64_t e = blockIdx.x * (int64_t)kThreads + threadIdx.x; e < size; e += gridDim.x * (int64_t)kThreads) {
        float sum = 0.0f;
        for (int k = 0; k < p.plan.clusters; ++k) sum += p.g.partial[k * size + e];
        p.g.S[e] += sum;
    }
}

template <class Tr>
cudaLaunchConfig_t config_of(const ClipPlan& plan, cudaLaunchAttribute* attribute) {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim.x = (unsigned)plan.cluster, attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)plan.cluster), config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = (size_t)plan.shared, config.attrs = attribute, config.numAttrs = 1;
    return config;
}

// The smallest cluster that holds a gradient and, with one for each sample, fills the chip; the longest tile that fits.
template <class Tr>
ClipPlan plan_of(const ClipGrad& g, int device) {
    const int64_t features = Tr::kA ? g.n : g.m;
    const int limit = device_attribute(kOp, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const int fill = device_attribute(kOp, cudaDevAttrMultiProcessorCount, device);
    ClipPlan best = {};
    for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
        const int64_t slice = slice_of(features, cluster);
        if (best.cluster && (g.N * best.cluster >= fill || slice < 64)) break;
        if (slice > Tr::kSlice) continue;
        ClipPlan plan = {};
        for (int positions = 64; positions >= 16 && !plan.cluster; positions /= 2) {
            if (positions > 16 && positions / 2 >= g.T) continue;
            for (int stages = 3; stages >= 2 && !plan.cluster; --stages) {
                const Layout<Tr> at((int)slice, slice_of(g.m, cluster), positions, stages, Tr::kA || g.dz);
                if (at.total <= limit) plan = {cluster, positions, stages, 0, at.total};
            }
        }
        if (plan.cluster) best = plan;
    }
    if (!best.cluster)
        throw std::runtime_error(std::string(kOp) + ": backend 'cuda' cannot hold a gradient of " +
                                 std::to_string(features) + " x " + std::to_string(g.r) + " in one cluster");
    const auto kernel = sample_grad_clip_kernel<Tr>;
    LALORA_CHECK(kOp, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, best.shared));
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = config_of<Tr>(best, &attribute);
    int clusters = 0;
    LALORA_CHECK(kOp, cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    if (clusters < 1) throw std::runtime_error(std::string(kOp) + ": no cluster fits the device");
    best.clusters = g.N < clusters ? (int)g.N : clusters;
    return best;
}

template <class Tr>
void run(const ClipGrad& g, const ClipPlan& plan, int device, void* stream) {
    const auto kernel = sample_grad_clip_kernel<Tr>;
    const ClipLaunch p = {g, plan};
    LALORA_CHECK(kOp, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared));
    launch(kOp, kernel, (int64_t)plan.cluster * plan.clusters, kThreads, plan.shared, plan.cluster, stream, p);
    const int64_t blocks = ((Tr::kA ? g.n : g.m) * g.r + kThreads - 1) / kThreads;
    const int64_t fill = 8 * (int64_t)device_attribute(kOp, cudaDevAttrMultiProcessorCount, device);
    launch(kOp, add_partials_kernel, blocks < fill ? blocks : fill, kThreads, 0, 0, stream, p);
}

template <class T, int NT, class F>
void with_factor(const ClipGrad& g, const F& f) {
    if (g.is_A)
        f(Traits<T, NT, true>{});
    else
        f(Traits<T, NT, false>{});
}

template <class T, class F>
void with_rank(const ClipGrad& g, const F& f) {
    if (g.r <= 16)
        with_factor<T, 2>(g, f);
    else if (g.r <= 32)
        with_factor<T, 4>(g, f);
    else if (g.r <= 64)
        with_factor<T, 8>(g, f);
    else
        throw std::runtime_error(std::string(kOp) + ": backend 'cuda' takes ranks to 64, got " + std::to_string(g.r));
}

template <class F>
void with_traits(const ClipGrad& g, int device, const F& f) {
    LALORA_CHECK(kOp, cudaSetDevice(device));
    if (device_attribute(kOp, cudaDevAttrComputeCapabilityMajor, device) < 9)
        throw std::runtime_error(std::string(kOp) + ": backend 'cuda' needs thread-block clusters (sm_90)");
    if (g.dtype == kF32)
        with_rank<float>(g, f);
    else if (g.dtype == kBF16)
        with_rank<BF16>(g, f);
    else
        with_rank<F16>(g, f);
}

ClipPlan plan_sample_grad_clip(const ClipGrad& g, int device) {
    ClipPlan plan = {};
    with_traits(g, device, [&](auto traits) { plan = plan_of<decltype(traits)>(g, device); });
    return plan;
}

void sample_grad_clip(const ClipGrad& g, const ClipPlan& plan, int device, void* stream) {
    if (!g.N || !(g.is_A ? g.n : g.m)) return;  // nothing to add to, and a grid of 0 blocks is an error
    with_traits(g, device, [&](auto traits) { run<decltype(traits)>(g, plan, device, stream); });
}

}  // namespace cuda
}  // namespace lalora
