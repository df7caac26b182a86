// A range of a noise stream, and the words that it is made of. One thread makes one block: four normals, 16 bytes.
#include "device.cuh"
#include "params.h"

namespace lalora {
namespace cuda {

constexpr int kNormalThreads = 256;

template <bool kAligned>
__global__ void __launch_bounds__(kNormalThreads) chacha20_normal_kernel(const Normals p) {
    const int64_t first = p.start >> 2, end = p.start + p.count;
    for (int64_t block = first + blockIdx.x * (int64_t)kNormalThreads + threadIdx.x; 4 * block < end;
         block += gridDim.x * (int64_t)kNormalThreads) {
        uint32_t x[16];
        chacha20_state<uint32_t>(x, p.stream.key, (uint32_t)block, p.tensor_index, p.stream.release_low,
                                 p.stream.release_high);
        chacha20_block(x);
        Four z;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            z.v[j] = normal_from_words<DeviceOps>(x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]);
        float* out = p.out + (4 * block - p.start);
        if (kAligned && 4 * block + 4 <= end) {
            store_global(reinterpret_cast<Four*>(out), z);
        } else {
            for (int j = 0; j < 4; ++j)
                if (4 * block + j >= p.start && 4 * block + j < end) out[j] = z.v[j];
        }
    }
}

__global__ void __launch_bounds__(kNormalThreads) chacha20_words_kernel(const Words p) {
    for (int64_t b = blockIdx.x * (int64_t)kNormalThreads + threadIdx.x; b < p.blocks;
         b += gridDim.x * (int64_t)kNormalThreads) {
        uint32_t x[16];
        chacha20_state<uint32_t>(x, p.key, (uint32_t)(p.start + b), p.nonce[0], p.nonce[1], p.nonce[2]);
        chacha20_block(x);
#pragma unroll
        for (int j = 0; j < 16; ++j) p.out[16 * b + j] = x[j];
    }
}

template <class Kernel, class Params>
void launch_stream(const char* op, Kernel kernel, int64_t blocks, const Params& p, int device, void* stream) {
    if (!blocks) return;
    LALORA_CHECK(op, cudaSetDevice(device));
    int resident = 0;
    LALORA_CHECK(op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kNormalThreads, 0));
    const int64_t fill = (int64_t)resident * device_attribute(op, cudaDevAttrMultiProcessorCount, device);
    const int64_t grid = (blocks + kNormalThreads - 1) / kNormalThreads;
    launch(op, kernel, grid < fill ? grid : fill, kNormalThreads, 0, 0, stream, p);
}

void chacha20_normal(const Normals& p, int device, void* stream) {
    const int64_t blocks = p.count ? ((p.start + p.count + 3) >> 2) - (p.start >> 2) : 0;
    const bool aligned = p.start % 4 == 0 && (uintptr_t)p.out % 16 == 0;
    const auto kernel = aligned ? chacha20_normal_kernel<true> : chacha20_normal_kernel<false>;
    launch_stream("chacha20_normal", kernel, blocks, p, device, stream);
}

void chacha20_words(const Words& p, int device, void* stream) {
    launch_stream("chacha20_words", chacha20_words_kernel, p.blocks, p, device, stream);
}

}  // namespace cuda
}  // namespace lalora
