// clip_reduce: out += sum_i w_i G_i, all tensors in one launch; the case of privatize.cuh without noise and filter.
#include "privatize.cuh"

namespace lalora {
namespace cuda {

void clip_reduce(const Release& p, int device, void* stream) {
    release_entry<false, false>("clip_reduce", p, device, stream);
}

}  // namespace cuda
}  // namespace lalora
