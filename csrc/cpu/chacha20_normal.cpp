// chacha20_normal: the stream by itself, for tests and for full tensors.
#include "noise.h"

LALORA_BEGIN

constexpr int64_t kRun = 64 * kGroup;

// Elements start .. start + count - 1. An element is the same number whatever range it is asked in.
inline void fill(const ChaChaNormal& p, int64_t start, int64_t count, float* out) {
    NoiseGroups groups(p.stream, p.tensor_index, start / 4);
    int64_t skip = start % 4;
    for (int64_t e = 0; e < count; skip = 0) {
        vf v[4];
        groups.next(v, [](int) {});
        if (!skip && count - e >= kGroup) {
            for (int k = 0; k < 4; ++k) store(out + e + k * W, v[k]);
            e += kGroup;
            continue;
        }
        const int64_t here = kGroup - skip < count - e ? kGroup - skip : count - e;
        memcpy(out + e, (const float*)v + skip, here * sizeof(float));
        e += here;
    }
}

LALORA_END

namespace lalora {
namespace LALORA_ISA {

void chacha20_normal(const ChaChaNormal& p) {
    const int64_t runs = (p.count + kRun - 1) / kRun;
#pragma omp parallel for num_threads(p.num_threads) schedule(static)
    for (int64_t k = 0; k < runs; ++k) {
        const int64_t e = k * kRun;
        fill(p, p.start + e, p.count - e < kRun ? p.count - e : kRun, p.out + e);
    }
}

void chacha20_words(const ChaChaWords& p) {
    vu lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    for (int64_t b = 0; b < p.blocks; b += W) {
        vu x[16];
        chacha20_state(x, p.key, lane + (uint32_t)(p.start + b), p.nonce[0], p.nonce[1], p.nonce[2]);
        chacha20_block(x);
        for (int i = 0; i < W && b + i < p.blocks; ++i)
            for (int k = 0; k < 16; ++k) p.out[(b + i) * 16 + k] = x[k][i];
    }
}

}  // namespace LALORA_ISA
}  // namespace lalora
