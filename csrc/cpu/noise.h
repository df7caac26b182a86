// The noise stream, W blocks (4 W elements) at a time.
#pragma once
#include "../chacha20.h"
#include "vec.h"

namespace lalora {
#if defined(__AVX2__) && !defined(__AVX512F__)  // no rotation instruction: whole bytes move by one shuffle
template <>
LALORA_FN LALORA_ISA::vu rotate<16>(LALORA_ISA::vu x) {
    const int64_t high = 0x0d0c0f0e09080b0a, low = 0x0504070601000302;
    return (LALORA_ISA::vu)_mm256_shuffle_epi8((__m256i)x, _mm256_set_epi64x(high, low, high, low));
}
template <>
LALORA_FN LALORA_ISA::vu rotate<8>(LALORA_ISA::vu x) {
    const int64_t high = 0x0e0d0c0f0a09080b, low = 0x0605040702010003;
    return (LALORA_ISA::vu)_mm256_shuffle_epi8((__m256i)x, _mm256_set_epi64x(high, low, high, low));
}
#endif
}  // namespace lalora

LALORA_BEGIN

constexpr int64_t kGroup = 4 * W;  // elements of W blocks

// The integer work of a group's words and the floating-point work of the group before it are independent: in turns
// they fill execution units that one of them leaves idle. Pays where registers suffice for both.
constexpr bool kInTurns = kRegisters == 32;

// Groups of one stream, one after another.
class NoiseGroups {
  public:
    NoiseGroups(const ChaChaStream& s, uint32_t tensor_index, uint64_t first_block, bool wanted = true) {
        if (!wanted) return;
        vu counter;
        for (int i = 0; i < W; ++i) counter[i] = i + (uint32_t)first_block;
        chacha20_state(initial_, s.key, counter, tensor_index, s.release_low, s.release_high);
        if (kInTurns) {
            vf none[8];
            memset(words_, 0, sizeof words_);
            advance(none, [](int) {});
        }
    }

    // The next 4 W elements, in order. between(k), k < 8, is called in the course of it: memory requests spread over
    // this long stretch of arithmetic cost nothing, in a burst after it they would stall.
    template <class Between>
    LALORA_FN void next(vf* normals, const Between& between) {
        vf halves[8];
        advance(halves, between);
        if constexpr (!kInTurns)
            for (int k = 0; k < 8; ++k) halves[k] = half_pair<VectorOps>(words_[2 * k], words_[2 * k + 1]);
        for (int k = 0; k < 4; ++k) normals[k] = halves[2 * k] + halves[2 * k + 1];  // of element 4 lane + k
        interleave<4>(normals);
    }

  private:
    template <class Between>
    LALORA_FN void advance(vf* halves, const Between& between) {
        vu x[16];
        for (int i = 0; i < 16; ++i) x[i] = initial_[i];
        for (int k = 0; k < 8; ++k) {
            double_round(x);
            between(k);
            if constexpr (kInTurns) halves[k] = half_pair<VectorOps>(words_[2 * k], words_[2 * k + 1]);
        }
        double_round(x);
        double_round(x);
        for (int i = 0; i < 16; ++i) words_[i] = x[i] + initial_[i];
        initial_[12] += (uint32_t)W;
    }

    vu initial_[16], words_[16];
};

LALORA_END
