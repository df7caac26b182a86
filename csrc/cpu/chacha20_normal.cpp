// chacha20_normal: the stream by itself, for tests and for full tensors.
#include "noise.h"

namespace lalora {
namespace LALORA_ISA {

void chacha20_normal(const ChaChaNormal& p) {
    const int64_t run = 64 * kGroup, runs = (p.count + run - 1) / run;
    const Noise n = noise_of(p.stream, p.tensor_index);
#pragma omp parallel for num_threads(p.num_threads) schedule(static)
    for (int64_t k = 0; k < runs; ++k) {
        const int64_t e = k * run, here = p.count - e < run ? p.count - e : run;
        noise(n, p.start + e, here, 1.0f, false, p.out + e);
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
