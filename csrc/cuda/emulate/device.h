// device.cuh's instructions on the emulated machine: what each lane of a warp gets, as the PTX manual defines it.
#pragma once
#include <cmath>
#include <cstring>

namespace lalora {
namespace cuda {

#define LALORA_DEVICE static inline
#define LALORA_MEMBER

LALORA_DEVICE unsigned char* shared_memory() { return emulate::shared_memory(blockIdx.x % emulate::cluster_size); }
LALORA_DEVICE void sync_block() { emulate::sync_block(); }

LALORA_DEVICE Four load_global(const Four* p, bool = false) {
    if ((uintptr_t)p % 16) throw std::runtime_error("emulated kernel: an unaligned load");
    return *p;
}
LALORA_DEVICE void store_global(Four* p, const Four& f) {
    if ((uintptr_t)p % 16) throw std::runtime_error("emulated kernel: an unaligned store");
    *p = f;
}

LALORA_DEVICE float to_float(float v) { return v; }
LALORA_DEVICE float to_float(BF16 v) { return ScalarOps::from_bits((int32_t)((uint32_t)v.bits << 16)); }
LALORA_DEVICE float to_float(F16 v) {
    _Float16 h;
    memcpy(&h, &v.bits, 2);
    return (float)h;
}
LALORA_DEVICE void from_float(float f, float& v) { v = f; }
LALORA_DEVICE void from_float(float f, BF16& v) {
    const uint32_t i = (uint32_t)ScalarOps::bits(f);
    v.bits = f != f ? 0x7fff : (uint16_t)((i + 0x7fff + (i >> 16 & 1)) >> 16);
}
LALORA_DEVICE void from_float(float f, F16& v) {
    const _Float16 h = (_Float16)f;
    memcpy(&v.bits, &h, 2);
}

LALORA_DEVICE void copy_async(void* to, const void* from, bool valid) { emulate::copy_async(to, from, 16, valid); }
LALORA_DEVICE void copy_commit() { emulate::copy_commit(); }
template <int kPending>
LALORA_DEVICE void copy_wait() {
    emulate::copy_wait(kPending);
}

LALORA_DEVICE int lane_id() { return (int)(threadIdx.x % 32); }

using Place = uintptr_t;
LALORA_DEVICE Place place_of(const void* p) { return (Place)p; }
LALORA_DEVICE void load_matrices(uint32_t (&r)[4], Place row) {
    const void* const* rows = emulate::warp_exchange(&row, sizeof row);
    for (int k = 0; k < 4; ++k) {
        const auto* from = *(const uint16_t* const*)rows[8 * k + lane_id() / 4] + 2 * (lane_id() % 4);
        r[k] = from[0] | (uint32_t)from[1] << 16;
    }
}
LALORA_DEVICE void load_matrices_transposed(uint32_t (&r)[4], Place row) {
    const void* const* rows = emulate::warp_exchange(&row, sizeof row);
    for (int k = 0; k < 4; ++k) {
        r[k] = 0;
        for (int half = 0; half < 2; ++half) {
            const auto* from = *(const uint16_t* const*)rows[8 * k + 2 * (lane_id() % 4) + half];
            r[k] |= (uint32_t)from[lane_id() / 4] << 16 * half;
        }
    }
}

// m16n8k16: lane 4 g + q holds A at rows g, g + 8 and B, C at columns g and 2 q, 2 q + 1.
template <class T>
LALORA_DEVICE void multiply(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const void* const* lanes = emulate::warp_exchange(mine, sizeof mine);
    const auto at = [&](int lane, int reg, int half) {
        return to_float(T{(uint16_t)(((const uint32_t*)lanes[lane])[reg] >> 16 * half)});
    };
    for (int i = 0; i < 4; ++i) {
        const int row = i / 2, column = 2 * (lane_id() % 4) + i % 2;
        for (int k = 0; k < 16; ++k)
            c[i] += at(4 * (lane_id() / 4) + k % 8 / 2, 2 * (k / 8) + row, k % 2) *
                    at(4 * column + k % 8 / 2, 4 + k / 8, k % 2);
    }
}

LALORA_DEVICE double warp_sum(double v) {
    for (int distance = 16; distance; distance >>= 1)
        v += *(const double*)emulate::warp_exchange(&v, sizeof v)[lane_id() ^ distance];
    return v;
}
LALORA_DEVICE float warp_max(float v) {
    for (int distance = 16; distance; distance >>= 1)
        v = fmaxf(v, *(const float*)emulate::warp_exchange(&v, sizeof v)[lane_id() ^ distance]);
    return v;
}

LALORA_DEVICE uint32_t cluster_rank() { return blockIdx.x % emulate::cluster_size; }
LALORA_DEVICE uint32_t cluster_size() { return emulate::cluster_size; }
LALORA_DEVICE uint32_t cluster_index() { return blockIdx.x / emulate::cluster_size; }
LALORA_DEVICE uint32_t cluster_count() { return gridDim.x / emulate::cluster_size; }
LALORA_DEVICE void cluster_arrive() { emulate::cluster_arrive(); }
LALORA_DEVICE void cluster_wait() { emulate::cluster_wait(); }
template <class T>
LALORA_DEVICE T* of_rank(T* p, uint32_t rank) {
    return (T*)(emulate::reach(rank) + ((unsigned char*)p - shared_memory()));
}

struct DeviceOps : ScalarOps {};

}  // namespace cuda
}  // namespace lalora
