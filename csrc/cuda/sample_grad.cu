// sample_grad: per-sample gradients and their squared norms in one launch; see cluster_grad.cuh.
#include "cluster_plan.cuh"

namespace lalora {
namespace cuda {

ClusterPlan plan_sample_grad(const LayerGrad& g, int device) {
    ClusterPlan plan = {};
    with_traits<false>(g, device, [&](auto traits) { plan = plan_of<decltype(traits)>(g, device); });
    return plan;
}

void sample_grad(const LayerGrad& g, const ClusterPlan& plan, int device, void* stream) {
    if (!g.N || !(g.is_A ? g.n : g.m)) return;  // nothing to write, and a grid of 0 blocks is an error
    with_traits<false>(g, device, [&](auto traits) { run_cluster<decltype(traits)>({g, plan}, stream); });
}

}  // namespace cuda
}  // namespace lalora
