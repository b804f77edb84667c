// The arithmetic of sampling that both backends compute alike, bit for bit: random numbers, Gumbel noise, probability mass, order.
// NOTE: products are added by `fused` only. A compiler may contract a product and a sum or not; this leaves it no choice.
#pragma once

#if defined(__CUDACC__)
#define FF_BOTH __device__ __forceinline__
FF_BOTH u32 float_bits(float x) { return __float_as_uint(x); }
FF_BOTH float bits_float(u32 b) { return __uint_as_float(b); }
FF_BOTH float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FF_BOTH u32 multiply_high(u32 a, u32 b) { return __umulhi(a, b); }
constexpr float kLog2E = 1.44269504f;
#else
#define FF_BOTH inline
FF_BOTH u32 float_bits(float x) { return bits_as<u32>(x); }
FF_BOTH float bits_float(u32 b) { return bits_as<float>(b); }
FF_BOTH float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FF_BOTH u32 multiply_high(u32 a, u32 b) { return u32(u64(a) * b >> 32); }
#endif

// What `Sampling::flags` says; Python: Flag in backends/sampling.py.
enum SamplingFlag : u32 {
  kBiased = 1,     // a bias is added to each logit
  kPenalised = 2,  // tokens that were seen are penalised
  kSampled = 4,    // temperature > 0
  kTopK = 8,
  kTopP = 16,
  kMinP = 32,
  kReported = 64,  // log probabilities are wanted
  kAdjusted = kBiased | kPenalised,
  kSelected = kTopK | kTopP | kMinP,
};

constexpr int kMostReported = 20;              // most alternatives of a token; Python: MAX_LOGPROBS
constexpr int kReportWords = 2 + kMostReported;  // of a token: mass of all, (maximum, chosen) logit, then `ranked` best first
constexpr u64 kNothing = ~u64(0);              // a place of a report that is not filled yet
constexpr u32 kPromptBit = 0x80000000u;        // of `Sampling::seen`: the prompt has the token; the other bits count generated ones

// What takes the place of a token where none can be chosen; Python: backends/sampling.py.
constexpr u32 kNotFinite = 0xffffffffu, kNoneAllowed = 0xfffffffeu;

// Philox 4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3; 2011): the block that the counter (block, position,
// 0, 0) has under the key `seed`. Its words are those of the tokens 4 * block + 0, 1, 2, 3.
FF_BOTH void philox(u64 seed, u32 position, u32 block, u32 (&words)[4]) {
  u32 key0 = u32(seed), key1 = u32(seed >> 32), c0 = block, c1 = position, c2 = 0, c3 = 0;
#if defined(__CUDACC__)
#pragma unroll 2  // it is small rather than fast
#endif
  for (int round = 0; round < 10; round++) {
    const u32 low0 = c0 * 0xD2511F53u, low2 = c2 * 0xCD9E8D57u;
    const u32 high0 = multiply_high(c0, 0xD2511F53u), high2 = multiply_high(c2, 0xCD9E8D57u);
    c0 = high2 ^ c1 ^ key0;
    c1 = low2;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// ln(1 + t) for t in [-1/4, 1/2], relative error below 1e-7 (a minimax polynomial of ln(1 + t) / t).
FF_BOTH float log1p_small(float t) {
  float p = 0.05411103740334511f;
  p = fused(p, t, -0.12076649069786072f);
  p = fused(p, t, 0.14994485676288605f);
  p = fused(p, t, -0.1682431995868683f);
  p = fused(p, t, 0.19975914061069489f);
  p = fused(p, t, -0.2499321848154068f);
  p = fused(p, t, 0.33333590626716614f);
  p = fused(p, t, -0.5000006556510925f);
  p = fused(p, t, 1.0f);
  return t * p;
}

// ln(x) of a normal number: 2^k (1 + t) with t in [-1/4, 1/2).
FF_BOTH float log_normal(float x) {
  const int k = int(float_bits(x) - 0x3f400000u) >> 23;
  const float t = bits_float(float_bits(x) - (u32(k) << 23)) - 1.0f;
  return fused(float(k), 0.69314718f, log1p_small(t));
}

// Gumbel noise -ln(-ln(u)) of u = 1 - (h + 1/2) / 2^32. NOTE: large noise comes from small h, where the logarithm is taken of
// 1 - v with v as exact as a float can be: the noise of the likeliest winners is not rounded to a grid.
FF_BOTH float gumbel(u32 h) {
  const float v = fused(float(h), 0x1p-32f, 0x1p-33f), u = fused(float(~h), 0x1p-32f, 0x1p-33f);
  return -log_normal(h < 0x40000000u ? -log1p_small(-v) : -log_normal(u));
}

// 2^-y in units of 2^-36, for y >= 0; 0 from y = 63 on.
constexpr int kMassBits = 36;
FF_BOTH u64 mass(float y) {
  y = y < 63.0f ? y : 63.0f;
  const u32 n = u32(y);
  const float f = y - float(n);
  float q = 0.00011458053631940857f;
  q = fused(q, f, -0.0012907799100503325f);
  q = fused(q, f, 0.009596276096999645f);
  q = fused(q, f, -0.05549895390868187f);
  q = fused(q, f, 0.24022606015205383f);
  q = fused(q, f, -0.6931471824645996f);
  q = fused(q, f, 1.0f);
  return (u64(u32(q * 0x1p24f)) << (kMassBits - 24)) >> n;
}

// The larger a logit, the smaller its order; equal logits (also 0 and -0) have the same.
FF_BOTH u32 order_of(float x) {
  const u32 b = float_bits(x + 0.0f);
  return b & 0x80000000u ? b : b ^ 0x7fffffffu;
}
FF_BOTH float logit_of(u32 order) { return bits_float(order & 0x80000000u ? order : order ^ 0x7fffffffu); }

// Ascending: the larger logit first, of equal ones the lower id.
FF_BOTH u64 ranked(float logit, u32 token) { return u64(order_of(logit)) << 32 | token; }

// A logit after bias and penalties; `seen` is the token's word of `Sampling::seen`.
FF_BOTH float adjusted(const Sampling& s, float x, u32 token, u32 seen) {
  if (s.flags & kBiased) x += s.bias[token];
  if (s.flags & kPenalised) {
    const float count = float(seen & ~kPromptBit);
    if (seen) x = x > 0 ? x / s.repetition : x * s.repetition;
    x = fused(-s.frequency, count, x);
    if (count > 0) x -= s.presence;
  }
  return x;
}

// What the chosen token has most of: at temperature 0 the logit, else logit / temperature + noise.
FF_BOTH float score(const Sampling& s, float x, u32 position, u32 token) {
  if (!(s.flags & kSampled)) return x;
  u32 words[4];
  philox(s.seed, position, token / 4, words);
  const u32 low = token & 1 ? words[1] : words[0], high = token & 1 ? words[3] : words[2];
  return fused(x, s.inverse_temperature, gumbel(token & 2 ? high : low));
}

// The share of `total` that top-p asks for, at least one unit.
FF_BOTH u64 top_p_mass(const Sampling& s, u64 total) {
  const u64 part = (total >> 32) * s.top_p + ((total & 0xffffffffu) * s.top_p >> 32);
  return part ? part : 1;
}
