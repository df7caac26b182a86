// privatize: out = smooth(S + sum_i w_i G_i + noise) / divisor, all tensors in one launch; see privatize.cuh.
#include "privatize.cuh"

namespace lalora {
namespace cuda {

void privatize(const Release& p, int device, void* stream) {
    const bool noise = p.noise_std != 0.0f;
    if (noise && p.smooth)
        release_entry<true, true>("privatize", p, device, stream);
    else if (noise)
        release_entry<true, false>("privatize", p, device, stream);
    else if (p.smooth)
        release_entry<false, true>("privatize", p, device, stream);
    else
        release_entry<false, false>("privatize", p, device, stream);
}

}  // namespace cuda
}  // namespace lalora
