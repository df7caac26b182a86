// The one clip rule, for host and device.
#pragma once
#include <cfloat>
#include <cmath>

#include "lalora.h"

namespace lalora {

// A smaller factor is not a normal float32 with room to spare, so that rounding it would break the bound.
constexpr double kSmallestFactor = 1e-36;

// grad_scale * min(1, max_norm / (grad_scale * sqrt(sq))); 1 * grad_scale for a zero norm, 0 for one that is not finite
// or so large that its factor cannot be rounded safely.
static LALORA_FN double clip_factor(double sq, double max_norm, double grad_scale) {
    const double norm = grad_scale * ::sqrt(sq);
    if (!(norm <= DBL_MAX)) return 0.0;  // norm - norm may be contracted with the product, and is not 0 then
    const double factor = norm > max_norm ? max_norm / norm * grad_scale : grad_scale;
    return factor >= kSmallestFactor ? factor : 0.0;
}

}  // namespace lalora
