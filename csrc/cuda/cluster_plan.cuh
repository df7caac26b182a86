// Which cluster, tile and instance of cluster_grad.cuh's kernel take a gradient, and their launch.
#pragma once
#include "cluster_grad.cuh"

namespace lalora {
namespace cuda {

template <class Tr>
cudaLaunchConfig_t config_of(const ClusterPlan& plan, cudaLaunchAttribute* attribute) {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim.x = (unsigned)plan.cluster, attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)plan.cluster), config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = (size_t)plan.shared, config.attrs = attribute, config.numAttrs = 1;
    return config;
}

// The longest tile of which three fit, or two.
template <class Tr>
ClusterPlan tiles_of(const LayerGrad& g, int cluster, int limit) {
    const int slice = slice_of(Tr::kA ? g.n : g.m, cluster), dy_slice = slice_of(g.m, cluster);
    for (int least = 3; least >= 2; --least)
        for (int positions = 64; positions >= 16; positions /= 2) {
            if (positions > 16 && positions / 2 >= g.T) continue;
            const int64_t whole = (g.T + positions - 1) / positions * positions;
            const int span = whole > Tr::kSpan ? Tr::kSpan : whole ? (int)whole : positions;
            for (int stages = 4; stages >= least; --stages) {
                ClusterPlan plan = {cluster, positions, stages, span, 0, 0};
                plan.shared = Layout<Tr>(slice, dy_slice, plan, Tr::kA || g.dz).total;
                if (plan.shared <= limit) return plan;
            }
        }
    return {};
}

// The cluster that by bytes and barriers is the fastest.
template <class Tr>
ClusterPlan plan_of(const LayerGrad& g, int device) {
    const int64_t features = Tr::kA ? g.n : g.m;
    if (g.T > INT32_MAX - 64)  // the kernel's positions are 32 bits wide
        throw std::runtime_error(std::string(Tr::kOp) + ": backend 'cuda' takes fewer than 2^31 positions, got " +
                                 std::to_string(g.T));
    const int limit = device_attribute(Tr::kOp, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const auto kernel = cluster_grad_kernel<Tr>;
    // The most that any plan takes: it is the kernel's, not the launch's.
    LALORA_CHECK(Tr::kOp, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
    ClusterPlan best = {};
    double least = 0.0;
    for (int cluster = 1; cluster <= kMaxCluster; ++cluster) {
        const int64_t slice = slice_of(features, cluster);
        if (best.cluster && slice < 64) break;
        if (slice > Tr::kSlice) continue;
        ClusterPlan plan = tiles_of<Tr>(g, cluster, limit);
        if (!plan.cluster) continue;
        cudaLaunchAttribute attribute;
        const cudaLaunchConfig_t config = config_of<Tr>(plan, &attribute);
        LALORA_CHECK(Tr::kOp, cudaOccupancyMaxActiveClusters(&plan.clusters, kernel, &config));
        if (plan.clusters < 1) continue;
        if (g.N < plan.clusters) plan.clusters = g.N ? (int)g.N : 1;
        const double rounds = (double)((g.N + plan.clusters - 1) / plan.clusters);
        const double bytes = (double)g.T * (slice + (Tr::kA ? slice_of(g.m, cluster) : 0)) * sizeof(typename Tr::T);
        // Of an H200, nanoseconds: a multiprocessor takes 60 bytes, all of them 4000; a round's start and end 3000.
        const double rate = 4000.0 / (plan.clusters * cluster), cost = rounds * (bytes / (rate < 60 ? rate : 60) + 3000);
        if (!best.cluster || cost < least) best = plan, least = cost;
    }
    if (!best.cluster)
        throw std::runtime_error(std::string(Tr::kOp) + ": backend 'cuda' cannot hold a gradient of " +
                                 std::to_string(features) + " x " + std::to_string(g.r) + " in one cluster");
    return best;
}

template <class Tr>
void run_cluster(const ClusterLaunch& p, void* stream) {
    const ClusterPlan& plan = p.plan;
    launch(Tr::kOp, cluster_grad_kernel<Tr>, (int64_t)plan.cluster * plan.clusters, kThreads, plan.shared, plan.cluster,
           stream, p);
}

template <class T, int NT, bool kClip, class F>
void with_factor(const LayerGrad& g, const F& f) {
    if (g.is_A)
        f(Traits<T, NT, true, kClip>{});
    else
        f(Traits<T, NT, false, kClip>{});
}

template <class T, bool kClip, class F>
void with_rank(const LayerGrad& g, const F& f) {
    if (g.r <= 16)
        with_factor<T, 2, kClip>(g, f);
    else if (g.r <= 32)
        with_factor<T, 4, kClip>(g, f);
    else if (g.r <= 64)
        with_factor<T, 8, kClip>(g, f);
    else
        throw std::runtime_error(std::string(Traits<T, 2, true, kClip>::kOp) +
                                 ": backend 'cuda' takes ranks to 64, got " + std::to_string(g.r));
}

template <bool kClip, class F>
void with_traits(const LayerGrad& g, int device, const F& f) {
    constexpr const char* op = Traits<float, 2, true, kClip>::kOp;
    LALORA_CHECK(op, cudaSetDevice(device));
    if (device_attribute(op, cudaDevAttrComputeCapabilityMajor, device) < 9)
        throw std::runtime_error(std::string(op) + ": backend 'cuda' needs thread-block clusters (sm_90)");
    if (g.dtype == kF32)
        with_rank<float, kClip>(g, f);
    else if (g.dtype == kBF16)
        with_rank<BF16, kClip>(g, f);
    else
        with_rank<F16, kClip>(g, f);
}

}  // namespace cuda
}  // namespace lalora
