// sample_grad_clip: each sample's gradient is clipped and summed where it was made; see cluster_grad.cuh.
#include "cluster_plan.cuh"

namespace lalora {
namespace cuda {

__global__ void __launch_bounds__(kThreads) add_partials_kernel(const ClusterLaunch p) {
    const int64_t size = (p.g.is_A ? p.g.n : p.g.m) * p.g.r;
    for (int64_t e = blockIdx.x * (int64_t)kThreads + threadIdx.x; e < size; e += gridDim.x * (int64_t)kThreads) {
        float sum = 0.0f;
        for (int k = 0; k < p.plan.clusters; ++k) sum += p.g.partial[k * size + e];
        p.g.S[e] += sum;
    }
}

template <class Tr>
void run(const ClusterLaunch& p, int device, void* stream) {
    run_cluster<Tr>(p, stream);
    const int64_t blocks = ((Tr::kA ? p.g.n : p.g.m) * p.g.r + kThreads - 1) / kThreads;
    const int64_t fill = 8 * (int64_t)device_attribute(Tr::kOp, cudaDevAttrMultiProcessorCount, device);
    launch(Tr::kOp, add_partials_kernel, blocks < fill ? blocks : fill, kThreads, 0, 0, stream, p);
}

ClusterPlan plan_sample_grad_clip(const LayerGrad& g, int device) {
    ClusterPlan plan = {};
    with_traits<true>(g, device, [&](auto traits) { plan = plan_of<decltype(traits)>(g, device); });
    return plan;
}

void sample_grad_clip(const LayerGrad& g, const ClusterPlan& plan, int device, void* stream) {
    if (!g.N || !(g.is_A ? g.n : g.m)) return;  // nothing to add to, and a grid of 0 blocks is an error
    with_traits<true>(g, device, [&](auto traits) { run<decltype(traits)>({g, plan}, device, stream); });
}

}  // namespace cuda
}  // namespace lalora
