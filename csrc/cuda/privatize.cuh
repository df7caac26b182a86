// The kernel of privatize and clip_reduce. A persistent grid walks the tiles of all tensors; a thread owns vectors of
// four elements, which are one block of ChaCha20 and 16 bytes of every sample's gradient.
#pragma once
#include "device.cuh"
#include "params.h"

namespace lalora {
namespace cuda {

struct ReleaseTraits {
    static constexpr int kThreads = 256, kBlocks = 4;  // blocks a multiprocessor
};

template <bool kAligned>
LALORA_DEVICE Four load_four(const float* p, int64_t e, int64_t numel, bool once) {
    Four f = {{0.0f, 0.0f, 0.0f, 0.0f}};
    if (kAligned) {
        if (e >= 0 && e < numel) f = load_global(reinterpret_cast<const Four*>(p + e), once);
    } else {
        for (int k = 0; k < 4; ++k)
            if (e + k >= 0 && e + k < numel) f.v[k] = p[e + k];
    }
    return f;
}

// NumPy's "symmetric" and "reflect", for any length.
LALORA_DEVICE int pad_index(int i, int length, int padding) {
    if (i >= 0 && i < length) return i;
    if (length == 1) return 0;
    const int period = padding == kSymmetric ? 2 * length : 2 * length - 2;
    i = (i + 2 * period) % period;
    return i < length ? i : (padding == kSymmetric ? 2 * length - 1 : period) - i;
}

template <bool kAligned>
LALORA_DEVICE void add_samples(Four& total, const Release& p, const SegmentRow& s, int64_t l, int64_t e) {
    constexpr int kSamples = kAligned ? 8 : 2;  // loads of 16 bytes in flight
    const int64_t samples = s.G ? p.N : 0;
    const float* weight = p.weights + l * p.w_row;
    for (int64_t i = 0; i < samples; i += kSamples) {
        float w[kSamples];
        Four g[kSamples];
#pragma unroll
        for (int k = 0; k < kSamples; ++k) w[k] = i + k < samples ? weight[(i + k) * p.w_step] : 0.0f;
#pragma unroll
        for (int k = 0; k < kSamples; ++k)  // weight 0: not read, so that no NaN leaks
            g[k] = load_four<kAligned>((const float*)s.G + (i + k) * s.G_stride, e, w[k] != 0.0f ? s.numel : 0, true);
#pragma unroll
        for (int k = 0; k < kSamples; ++k)
#pragma unroll
            for (int j = 0; j < 4; ++j) total.v[j] += w[k] * g[k].v[j];
    }
}

LALORA_DEVICE Four noise_of(const Release& p, const SegmentRow& s, int64_t e) {
    uint32_t x[16];
    chacha20_state<uint32_t>(x, p.stream.key, (uint32_t)(e >> 2), (uint32_t)s.tensor_index, p.stream.release_low,
                             p.stream.release_high);
    chacha20_block(x);
    Four noise;
#pragma unroll
    for (int j = 0; j < 4; ++j)
        noise.v[j] = p.noise_std * normal_from_words<DeviceOps>(x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]);
    return noise;
}

// Every other block draws before it reads, so that a multiprocessor's integer units and its loads are busy together.
template <bool kNoise, bool kAligned>
LALORA_DEVICE Four summed(const Release& p, const SegmentRow& s, int64_t l, int64_t e, bool draws_first) {
    Four total = {{0.0f, 0.0f, 0.0f, 0.0f}}, noise = total;
    if (s.S) total = load_four<kAligned>((const float*)s.S, e, s.numel, false);
#pragma unroll 1
    for (int turn = 0; turn < (kNoise ? 2 : 1); ++turn)
        if (kNoise && (turn == 0) == draws_first)
            noise = noise_of(p, s, e);
        else
            add_samples<kAligned>(total, p, s, l, e);
#pragma unroll
    for (int j = 0; kNoise && j < 4; ++j) total.v[j] += noise.v[j];
    return total;
}

template <bool kAligned>
LALORA_DEVICE void store_four(float* p, int64_t e, int64_t numel, const Four& f) {
    if (kAligned) {
        if (e < numel) store_global(reinterpret_cast<Four*>(p + e), f);
    } else {
        for (int k = 0; k < 4; ++k)
            if (e + k < numel) p[e + k] = f.v[k];
    }
}

template <bool kNoise, bool kSmooth, bool kAligned>
__global__ void __launch_bounds__(ReleaseTraits::kThreads, ReleaseTraits::kBlocks)
    release_kernel(const Release p) {
    float* tile = reinterpret_cast<float*>(shared_memory());  // kSmooth: p.tile values
    const bool draws_first = blockIdx.x / p.multiprocessors % 2;
    for (int64_t index = blockIdx.x; index < p.tile_count; index += gridDim.x) {
        const int64_t l = p.tiles[index];
        const SegmentRow s = p.rows[l];
        const int halo = kSmooth ? (int)s.halo : 0;
        const int64_t begin = (index - s.first_tile) * (p.tile - 2 * halo) - halo;
        float* out = (float*)s.out;
        for (int v = 4 * threadIdx.x; v < p.tile; v += 4 * ReleaseTraits::kThreads) {
            if (begin + v >= s.numel) break;
            Four total = summed<kNoise, kAligned>(p, s, l, begin + v, draws_first);
            if (kSmooth && s.smooth) {
                *reinterpret_cast<Four*>(tile + v) = total;
                continue;
            }
            for (int j = 0; j < 4; ++j) total.v[j] *= p.factor;
            store_four<kAligned>(out, begin + v, s.numel, total);
        }
        if (kSmooth && s.smooth) {  // uniform over the block
            sync_block();
            const int length = (int)s.length, inner = (int)s.inner;
            for (int v = halo + 4 * threadIdx.x; v < p.tile - halo; v += 4 * ReleaseTraits::kThreads) {
                const int64_t e = begin + v;
                if (e >= s.numel) break;
                int row = (int)e / inner, column = (int)e - row * inner, pos = row % length;
                Four f;
                for (int j = 0; j < 4; ++j) {
                    const float* t = tile + v + j;
                    float sum = 0.0f;
                    if (e + j < s.numel) {
                        sum = 0.375f * t[0];
                        for (int k = 1; k <= 2; ++k) {
                            const float* low = t + (pad_index(pos - k, length, p.padding) - pos) * inner;
                            const float* high = t + (pad_index(pos + k, length, p.padding) - pos) * inner;
                            sum += (k == 1 ? 0.25f : 0.0625f) * (*low + *high);
                        }
                    }
                    f.v[j] = p.factor * sum;
                    if (++column == inner) column = 0, pos = pos + 1 == length ? 0 : pos + 1;
                }
                store_four<kAligned>(out, e, s.numel, f);
            }
            sync_block();  // the next tile overwrites this one
        }
    }
}

template <bool kNoise, bool kSmooth, bool kAligned>
void launch_release(const char* op, const Release& p, int device, void* stream) {
    const auto kernel = release_kernel<kNoise, kSmooth, kAligned>;
    const int shared = kSmooth ? p.tile * (int)sizeof(float) : 0;
    if (shared > 48 * 1024)
        LALORA_CHECK(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    int blocks = 0;
    LALORA_CHECK(op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, ReleaseTraits::kThreads, shared));
    Release told = p;
    told.multiprocessors = device_attribute(op, cudaDevAttrMultiProcessorCount, device);
    const int64_t fill = (int64_t)blocks * told.multiprocessors;
    launch(op, kernel, p.tile_count < fill ? p.tile_count : fill, ReleaseTraits::kThreads, shared, 0, stream, told);
}

template <bool kNoise, bool kSmooth>
void release_entry(const char* op, const Release& p, int device, void* stream) {
    if (!p.tile_count) return;
    LALORA_CHECK(op, cudaSetDevice(device));
    if (p.aligned)
        launch_release<kNoise, kSmooth, true>(op, p, device, stream);
    else
        launch_release<kNoise, kSmooth, false>(op, p, device, stream);
}

}  // namespace cuda
}  // namespace lalora
