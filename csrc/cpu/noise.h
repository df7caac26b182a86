// The noise stream, W blocks (4 W elements) at a time.
#pragma once
#include "../chacha20.h"
#include "vec.h"

LALORA_BEGIN

constexpr int64_t kGroup = 4 * W;  // elements of W blocks

struct Noise {
    uint32_t key[8];
    uint32_t tensor_index, release_low, release_high;
};

inline Noise noise_of(const ChaChaStream& s, uint32_t tensor_index) {
    Noise n;
    memcpy(n.key, s.key, sizeof n.key);
    n.tensor_index = tensor_index, n.release_low = s.release_low, n.release_high = s.release_high;
    return n;
}

// Elements 4 block .. 4 block + kGroup - 1.
LALORA_FN void noise_group(const Noise& n, uint64_t block, float* out) {
    vu x[16], lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    chacha20_state(x, n.key, lane + (uint32_t)block, n.tensor_index, n.release_low, n.release_high);
    chacha20_block(x);
    vf normals[4];  // element 4 lane + k
    for (int k = 0; k < 4; ++k)
        normals[k] = normal_from_words<VectorOps>(x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3]);
    interleave<4>(normals);
    for (int k = 0; k < 4; ++k) store(out + k * W, normals[k]);
}

// out[e] (+)= std * element start + e, e < count. An element is the same number whatever range it is asked in.
inline void noise(const Noise& n, int64_t start, int64_t count, float std, bool add, float* out) {
    int64_t block = start / 4, skip = start % 4;
    for (int64_t e = 0; e < count; block += W) {
        float group[kGroup];
        noise_group(n, block, group);
        const int64_t here = kGroup - skip < count - e ? kGroup - skip : count - e;
        if (add)
            for (int64_t i = 0; i < here; ++i) out[e + i] += std * group[skip + i];
        else
            for (int64_t i = 0; i < here; ++i) out[e + i] = std * group[skip + i];
        e += here;
        skip = 0;
    }
}

LALORA_END
