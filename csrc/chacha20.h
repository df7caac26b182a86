// The one noise generator (docs/privacy.md): ChaCha20 words and the sum of four Gaussians, for a scalar on host or
// device and for a vector of blocks on the CPU. `Ops` supplies the types and the four operations that differ.
#pragma once
#include <cmath>
#include <cstring>

#include "lalora.h"

namespace lalora {

template <int n, class U>
LALORA_FN U rotate(U x) {
    return (x << n) | (x >> (32 - n));
}

template <class U>
static LALORA_FN void quarter_round(U& a, U& b, U& c, U& d) {
    a += b, d = rotate<16>(d ^ a);
    c += d, b = rotate<12>(b ^ c);
    a += b, d = rotate<8>(d ^ a);
    c += d, b = rotate<7>(b ^ c);
}

template <class U>
static LALORA_FN void double_round(U* x) {
    quarter_round(x[0], x[4], x[8], x[12]);
    quarter_round(x[1], x[5], x[9], x[13]);
    quarter_round(x[2], x[6], x[10], x[14]);
    quarter_round(x[3], x[7], x[11], x[15]);
    quarter_round(x[0], x[5], x[10], x[15]);
    quarter_round(x[1], x[6], x[11], x[12]);
    quarter_round(x[2], x[7], x[8], x[13]);
    quarter_round(x[3], x[4], x[9], x[14]);
}

// RFC 8439, section 2.3: x holds the initial state and receives the block.
template <class U>
static LALORA_FN void chacha20_block(U* x) {
    U initial[16];
    for (int i = 0; i < 16; ++i) initial[i] = x[i];
    for (int round = 0; round < 10; ++round) double_round(x);
    for (int i = 0; i < 16; ++i) x[i] += initial[i];
}

template <class U>
static LALORA_FN void chacha20_state(U* x, const uint32_t* key, U counter, uint32_t n0, uint32_t n1, uint32_t n2) {
    const U zero = counter ^ counter;
    x[0] = zero + 0x61707865u, x[1] = zero + 0x3320646eu, x[2] = zero + 0x79622d32u, x[3] = zero + 0x6b206574u;
    for (int i = 0; i < 8; ++i) x[4 + i] = zero + key[i];
    x[12] = counter, x[13] = zero + n0, x[14] = zero + n1, x[15] = zero + n2;
}

// -log(u), u = (w + 1/2) 2^-32. For u >= 1/2 the float v = 1 - u, whose integer is ~w, has the digits that the float u
// has lost: a = 1 - v is corrected by what its rounding left over. Minimax polynomial of log(1 + f), relative error
// 3.2e-8 on [sqrt(1/2) - 1, sqrt 2 - 1].
template <class Ops>
static LALORA_FN typename Ops::F minus_log(typename Ops::U w) {
    using F = typename Ops::F;
    using I = typename Ops::I;
    const I i = (I)w;  // negative where u >= 1/2
    const F v = Ops::to_float(i ^ (i >> 31)) * 0x1p-32f + 0x1p-33f, zero = {};
    const F a = i < 0 ? 1.0f - v : v;
    const F rest = i < 0 ? 1.0f - a - v : zero;
    const I bits = Ops::bits(a), e = (bits - 0x3f3504f3) >> 23;  // a = 2^e (1 + f)
    const F f = Ops::from_bits(bits - (e << 23)) - 1.0f;
    F p = f * 0.08700434863567352f - 0.14267486333847046f;
    p = p * f + 0.14914768934249878f;
    p = p * f - 0.1657758504152298f;
    p = p * f + 0.19963063299655914f;
    p = p * f - 0.2500133812427521f;
    p = p * f + 0.3333390951156616f;
    const F q = (p * f - 0.5f) * (f * f) + (f + rest);
    return Ops::to_float(e) * -0.6931471824645996f - q;
}

// sin(2 pi (w + 1/2) 2^-32 + pi / 4) = cos(t), t's integer b; folded to sin(pi / 2 - |t|) on the integer, so that no
// digit is lost. Minimax polynomial of sin(pi z), |z| <= 1/2, absolute error 7.6e-9; pi z last, so that near 1 only its
// rounding counts.
template <class Ops>
static LALORA_FN typename Ops::F sin_turn(typename Ops::U w) {
    using F = typename Ops::F;
    using I = typename Ops::I;
    const I b = (I)(w - 0x20000000u);
    const F z = Ops::to_float(0x40000000 - (b ^ (b >> 31))) * 0x1p-31f - 0x1p-32f;
    const F z2 = z * z;
    F p = z2 * 0.07802014797925949f - 0.5985169410705566f;
    p = p * z2 + 2.55012583732605f;
    p = p * z2 - 5.1677141189575195f;
    return z * 3.1415927410125732f + p * (z * z2);
}

// cos t + sin t = sqrt 2 sin(t + pi/4): half the sum of a Box-Muller pair takes one sine.
template <class Ops>
static LALORA_FN typename Ops::F half_pair(typename Ops::U w0, typename Ops::U w1) {
    return Ops::sqrt(minus_log<Ops>(w0)) * sin_turn<Ops>(w1);
}

// Four words to one normal.
template <class Ops>
static LALORA_FN typename Ops::F normal_from_words(typename Ops::U w0, typename Ops::U w1, typename Ops::U w2,
                                                   typename Ops::U w3) {
    return half_pair<Ops>(w0, w1) + half_pair<Ops>(w2, w3);
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
