#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include "scratch.h"
#include "tsan.h"

namespace lalora {

#define LALORA_DECLARE(isa)                         \
    namespace isa {                                 \
    void sample_grad(const SampleGrad&);            \
    void sample_grad_clip(const SampleGradClip&);   \
    void privatize(const Privatize&);               \
    void chacha20_normal(const ChaChaNormal&);      \
    void chacha20_words(const ChaChaWords&);        \
    }
#define LALORA_KERNELS(isa) \
    {isa::sample_grad, isa::sample_grad_clip, isa::privatize, isa::chacha20_normal, isa::chacha20_words}

LALORA_DECLARE(baseline)
LALORA_DECLARE(avx2)
LALORA_DECLARE(avx512)
LALORA_DECLARE(avx512bf16)

#if defined(LALORA_WITH_avx512)
static bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// setup.py says which the compiler could make.
const Isa kIsas[] = {
#if defined(LALORA_WITH_avx512bf16)
    {"avx512bf16", LALORA_KERNELS(avx512bf16), [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
#endif
#if defined(LALORA_WITH_avx512)
    {"avx512", LALORA_KERNELS(avx512), has_avx512},
#endif
#if defined(LALORA_WITH_avx2)
    {"avx2", LALORA_KERNELS(avx2), [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", LALORA_KERNELS(baseline), [] { return true; }},
};
const int kIsaCount = sizeof kIsas / sizeof kIsas[0];

static std::atomic<const Isa*> chosen{nullptr};

const Isa& current_isa() {
    const Isa* isa = chosen.load();
    if (!isa) {
        isa = kIsas;
        while (!isa->supported()) ++isa;
        chosen.store(isa);
    }
    return *isa;
}

void set_isa(const Isa& isa) { chosen.store(&isa); }

namespace {
struct Buffer {
    float* data = nullptr;
    int64_t floats = 0;
    ~Buffer() { std::free(data); }
};
thread_local Buffer buffers[kSlots];
}  // namespace

float* scratch(Slot slot, int64_t floats) {
    Buffer& b = buffers[slot];
    if (floats > b.floats || !b.data) {
        std::free(b.data);
        b.floats = (floats / 16 + 1) * 16;
        b.data = (float*)std::aligned_alloc(64, b.floats * sizeof(float));
        if (!b.data) {
            b.floats = 0;
            throw std::bad_alloc();
        }
    }
    return b.data;
}

}  // namespace lalora
