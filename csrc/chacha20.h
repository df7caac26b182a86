// The one noise generator (SPEC section 6): ChaCha20 words and the sum of four Gaussians, for a scalar on host or
// device and for a vector of blocks on the CPU. `Ops` supplies the types and the four operations that differ.
#pragma once
#include <cmath>
#include <cstring>

#include "lalora.h"

namespace lalora {

template <class U>
static LALORA_FN void quarter_round(U& a, U& b, U& c, U& d) {
    a += b, d ^= a, d = (d << 16) | (d >> 16);
    c += d, b ^= c, b = (b << 12) | (b >> 20);
    a += b, d ^= a, d = (d << 8) | (d >> 24);
    c += d, b ^= c, b = (b << 7) | (b >> 25);
}

// RFC 8439, section 2.3: x holds the initial state and receives the block.
template <class U>
static LALORA_FN void chacha20_block(U* x) {
    U initial[16];
    for (int i = 0; i < 16; ++i) initial[i] = x[i];
    for (int round = 0; round < 10; ++round) {
        quarter_round(x[0], x[4], x[8], x[12]);
        quarter_round(x[1], x[5], x[9], x[13]);
        quarter_round(x[2], x[6], x[10], x[14]);
        quarter_round(x[3], x[7], x[11], x[15]);
        quarter_round(x[0], x[5], x[10], x[15]);
        quarter_round(x[1], x[6], x[11], x[12]);
        quarter_round(x[2], x[7], x[8], x[13]);
        quarter_round(x[3], x[4], x[9], x[14]);
    }
    for (int i = 0; i < 16; ++i) x[i] += initial[i];
}

template <class U>
static LALORA_FN void chacha20_state(U* x, const uint32_t* key, U counter, uint32_t n0, uint32_t n1, uint32_t n2) {
    const U zero = counter ^ counter;
    x[0] = zero + 0x61707865u, x[1] = zero + 0x3320646eu, x[2] = zero + 0x79622d32u, x[3] = zero + 0x6b206574u;
    for (int i = 0; i < 8; ++i) x[4 + i] = zero + key[i];
    x[12] = counter, x[13] = zero + n0, x[14] = zero + n1, x[15] = zero + n2;
}

// -log(u), u = (w + 1/2) 2^-32. Above one half the float u would have lost the digits of 1 - u, so v = 1 - u, whose
// integer is ~w, is converted instead. Minimax polynomial of log(1 + f), relative error 3.2e-8 on [sqrt(1/2), sqrt 2].
template <class Ops>
static LALORA_FN typename Ops::F minus_log(typename Ops::U w) {
    using F = typename Ops::F;
    using I = typename Ops::I;
    const I i = (I)w, upper = i >> 31;  // all ones where u >= 1/2
    const F v = (Ops::to_float(i ^ upper) + 0.5f) * 0x1p-32f;
    const I bits = Ops::bits(v);
    const I e = (bits - 0x3f3504f3) >> 23;  // v = 2^e (1 + f)
    const F f_low = Ops::from_bits(bits - (e << 23)) - 1.0f;
    const I e_high = (0x3e95f619 - bits) >> 31;                // -1 where v > 1 - sqrt(1/2)
    const F f_high = e_high != 0 ? 1.0f - 2.0f * v : -v;       // 1 - v = 2^e_high (1 + f)
    const F f = upper != 0 ? f_high : f_low;
    const F k = Ops::to_float(upper != 0 ? e_high : e);
    F p = f * 0.08700434863567352f - 0.14267486333847046f;
    p = p * f + 0.14914768934249878f;
    p = p * f - 0.1657758504152298f;
    p = p * f + 0.19963063299655914f;
    p = p * f - 0.2500133812427521f;
    p = p * f + 0.3333390951156616f;
    const F q = (p * f - 0.5f) * (f * f) + f;
    return (k * -0.693145751953125f) - (k * 1.42860677e-6f + q);
}

// sin(2 pi (w + 1/2) 2^-32 + pi / 4): the angle is folded to [-pi/2, pi/2] on the integer, so no digit is lost.
// Minimax polynomial of sin(pi z), absolute error 3.4e-9.
template <class Ops>
static LALORA_FN typename Ops::F sin_turn(typename Ops::U w) {
    using F = typename Ops::F;
    using I = typename Ops::I;
    const I a = (I)(w + 0x20000000u);
    const I outside = (a ^ (I)((typename Ops::U)a << 1)) >> 31;
    const F z = (Ops::to_float(a ^ (outside & 0x7fffffff)) + 0.5f) * 0x1p-31f;
    const F z2 = z * z;
    F p = z2 * 0.0772201269865036f - 0.5980451703071594f;
    p = p * z2 + 2.5500314235687256f;
    p = p * z2 - 5.1677069664001465f;
    p = p * z2 + 3.141592502593994f;
    return p * z;
}

// Four words to one normal. cos t + sin t = sqrt 2 sin(t + pi/4), so each Box-Muller pair takes one sine.
template <class Ops>
static LALORA_FN typename Ops::F normal_from_words(typename Ops::U w0, typename Ops::U w1, typename Ops::U w2,
                                                   typename Ops::U w3) {
    return Ops::sqrt(minus_log<Ops>(w0)) * sin_turn<Ops>(w1) + Ops::sqrt(minus_log<Ops>(w2)) * sin_turn<Ops>(w3);
}

struct ScalarOps {
    using F = float;
    using I = int32_t;
    using U = uint32_t;
    static LALORA_FN F to_float(I i) { return (float)i; }
    static LALORA_FN F sqrt(F f) { return ::sqrtf(f); }
#ifdef __CUDA_ARCH__
    static LALORA_FN I bits(F f) { return __float_as_int(f); }
    static LALORA_FN F from_bits(I i) { return __int_as_float(i); }
#else
    static LALORA_FN I bits(F f) {
        I i;
        memcpy(&i, &f, 4);
        return i;
    }
    static LALORA_FN F from_bits(I i) {
        F f;
        memcpy(&f, &i, 4);
        return f;
    }
#endif
};

}  // namespace lalora
