// Vectors as wide as the instruction set being compiled for, in GCC/Clang vector extensions. Included inside
// kernel_body.h's anonymous namespace, once per instruction set.

#define DINO_D2_INLINE inline __attribute__((always_inline))

template <class A>
struct VectorOf {
  static constexpr int width = DINO_D2_VECTOR_BYTES / sizeof(A);
  typedef A Type __attribute__((vector_size(DINO_D2_VECTOR_BYTES)));
  typedef A Unaligned __attribute__((vector_size(DINO_D2_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
};
template <class A>
using Vector = typename VectorOf<A>::Type;

// One row of channels, loaded as A whatever it is stored as.
template <class A>
DINO_D2_INLINE Vector<A> load(const A* from) {
  return *reinterpret_cast<const typename VectorOf<A>::Unaligned*>(from);
}
template <class A>
DINO_D2_INLINE Vector<A> load(const BFloat16* from) {
  typedef uint16_t Halves
      __attribute__((vector_size(DINO_D2_VECTOR_BYTES / 2), aligned(sizeof(uint16_t)), may_alias));
  typedef uint32_t Words __attribute__((vector_size(DINO_D2_VECTOR_BYTES)));
  const Halves halves = *reinterpret_cast<const Halves*>(from);
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(halves, Words) << 16);
}
template <class A>
DINO_D2_INLINE void store(A* to, Vector<A> x) {
  *reinterpret_cast<typename VectorOf<A>::Unaligned*>(to) = x;
}

DINO_D2_INLINE float widen(float x) { return x; }
DINO_D2_INLINE double widen(double x) { return x; }
DINO_D2_INLINE float widen(BFloat16 x) {
  const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
  float result;
  __builtin_memcpy(&result, &word, sizeof(result));
  return result;
}
DINO_D2_INLINE void narrow(float x, float* to) { *to = x; }
DINO_D2_INLINE void narrow(double x, double* to) { *to = x; }
DINO_D2_INLINE void narrow(float x, BFloat16* to) {  // to nearest, ties to even; NaN stays NaN
  uint32_t word;
  __builtin_memcpy(&word, &x, sizeof(word));
  to->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// Two bfloat16 numbers in each word, the first one in its lower half.
typedef uint32_t Words __attribute__((vector_size(DINO_D2_VECTOR_BYTES)));
typedef uint32_t UnalignedWords
    __attribute__((vector_size(DINO_D2_VECTOR_BYTES), aligned(sizeof(uint16_t)), may_alias));

DINO_D2_INLINE Words load_words(const BFloat16* from) { return *reinterpret_cast<const UnalignedWords*>(from); }
DINO_D2_INLINE void store_words(BFloat16* to, Words words) { *reinterpret_cast<UnalignedWords*>(to) = words; }

// `narrow` for whole vectors, with the result in the upper half of each word.
DINO_D2_INLINE Words narrowed(Vector<float> x) {
  const Words words = reinterpret_cast<Words>(x);
  const Words rounded = words + 0x7fff + ((words >> 16) & 1);
  return x != x ? Words{} + 0x7fc00000u : rounded;
}

constexpr int kPartBytes = 16, kParts = DINO_D2_VECTOR_BYTES / kPartBytes;

// Two vectors whose numbers are to be taken together, place by place.
template <class A>
struct Pairs {
  Vector<A> first, second;

  DINO_D2_INLINE Vector<A> sum() const { return first + second; }
  DINO_D2_INLINE Vector<A> larger() const { return second > first ? second : first; }
};

#if defined(__clang__)
#define DINO_D2_SHUFFLE(MASK, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DINO_D2_SHUFFLE(MASK, ...) __builtin_shuffle(a, b, MASK{__VA_ARGS__})
#endif

// The numbers at even and at odd places of a and what follows it, b.
template <class A>
DINO_D2_INLINE Pairs<A> unzip(Vector<A> a, Vector<A> b) {
  constexpr int width = VectorOf<A>::width;
  typedef __typeof__(a < b) Mask;
  if constexpr (width == 2) {
    return {DINO_D2_SHUFFLE(Mask, 0, 2), DINO_D2_SHUFFLE(Mask, 1, 3)};
  } else if constexpr (width == 4) {
    return {DINO_D2_SHUFFLE(Mask, 0, 2, 4, 6), DINO_D2_SHUFFLE(Mask, 1, 3, 5, 7)};
  } else if constexpr (width == 8) {
    return {DINO_D2_SHUFFLE(Mask, 0, 2, 4, 6, 8, 10, 12, 14), DINO_D2_SHUFFLE(Mask, 1, 3, 5, 7, 9, 11, 13, 15)};
  } else {
    static_assert(width == 16);
    return {DINO_D2_SHUFFLE(Mask, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
            DINO_D2_SHUFFLE(Mask, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
  }
}

// Neighbours within each 16 bytes, which processors shuffle in one instruction: of a and b in turn.
template <class A>
DINO_D2_INLINE Pairs<A> neighbours(Vector<A> a, Vector<A> b) {
  constexpr int width = VectorOf<A>::width;
  typedef __typeof__(a < b) Mask;
  if constexpr (kParts == 1) {
    return unzip<A>(a, b);
  } else if constexpr (width == 4) {
    return {DINO_D2_SHUFFLE(Mask, 0, 4, 2, 6), DINO_D2_SHUFFLE(Mask, 1, 5, 3, 7)};
  } else if constexpr (width == 8 && sizeof(A) == 8) {
    return {DINO_D2_SHUFFLE(Mask, 0, 8, 2, 10, 4, 12, 6, 14), DINO_D2_SHUFFLE(Mask, 1, 9, 3, 11, 5, 13, 7, 15)};
  } else if constexpr (width == 8) {
    return {DINO_D2_SHUFFLE(Mask, 0, 2, 8, 10, 4, 6, 12, 14), DINO_D2_SHUFFLE(Mask, 1, 3, 9, 11, 5, 7, 13, 15)};
  } else {
    static_assert(width == 16);
    return {DINO_D2_SHUFFLE(Mask, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30),
            DINO_D2_SHUFFLE(Mask, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31)};
  }
}

// Neighbouring parts of 16 bytes: those of x, then those of y.
template <class A>
DINO_D2_INLINE Pairs<A> neighbouring_parts(Vector<A> x, Vector<A> y) {
#if DINO_D2_VECTOR_BYTES == 16
  return {x, y};  // there is one part
#else
  const Vector<double> a = reinterpret_cast<Vector<double>>(x), b = reinterpret_cast<Vector<double>>(y);
  typedef __typeof__(a < b) Mask;
#if DINO_D2_VECTOR_BYTES == 64
  return {reinterpret_cast<Vector<A>>(DINO_D2_SHUFFLE(Mask, 0, 1, 4, 5, 8, 9, 12, 13)),
          reinterpret_cast<Vector<A>>(DINO_D2_SHUFFLE(Mask, 2, 3, 6, 7, 10, 11, 14, 15))};
#else
  return {reinterpret_cast<Vector<A>>(DINO_D2_SHUFFLE(Mask, 0, 1, 4, 5)),
          reinterpret_cast<Vector<A>>(DINO_D2_SHUFFLE(Mask, 2, 3, 6, 7))};
#endif
#endif
}

// a and b in turns, in two vectors: the inverse of `unzip`.
template <class A>
DINO_D2_INLINE Pairs<A> zip(Vector<A> a, Vector<A> b) {
  constexpr int width = VectorOf<A>::width;
  typedef __typeof__(a < b) Mask;
  if constexpr (width == 2) {
    return {DINO_D2_SHUFFLE(Mask, 0, 2), DINO_D2_SHUFFLE(Mask, 1, 3)};
  } else if constexpr (width == 4) {
    return {DINO_D2_SHUFFLE(Mask, 0, 4, 1, 5), DINO_D2_SHUFFLE(Mask, 2, 6, 3, 7)};
  } else if constexpr (width == 8) {
    return {DINO_D2_SHUFFLE(Mask, 0, 8, 1, 9, 2, 10, 3, 11), DINO_D2_SHUFFLE(Mask, 4, 12, 5, 13, 6, 14, 7, 15)};
  } else {
    static_assert(width == 16);
    return {DINO_D2_SHUFFLE(Mask, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
            DINO_D2_SHUFFLE(Mask, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
  }
}
#undef DINO_D2_SHUFFLE

// Lane i of the result is the sum over the lanes of partial[i]; `partial` is used up.
template <class A>
DINO_D2_INLINE Vector<A> sum_lanes(Vector<A>* partial) {
  int rows = VectorOf<A>::width;
  for (unsigned lanes = kPartBytes / sizeof(A); lanes > 1; lanes /= 2) {
    rows /= 2;
    for (int i = 0; i < rows; ++i) partial[i] = neighbours<A>(partial[2 * i], partial[2 * i + 1]).sum();
  }
  for (int parts = kParts; parts > 1; parts /= 2) {
    rows /= 2;
    for (int i = 0; i < rows; ++i) partial[i] = neighbouring_parts<A>(partial[2 * i], partial[2 * i + 1]).sum();
  }
  return partial[0];
}
template <class A>
DINO_D2_INLINE A sum_of_lanes(Vector<A> x) {
  for (unsigned lanes = kPartBytes / sizeof(A); lanes > 1; lanes /= 2) x = neighbours<A>(x, x).sum();
  for (int parts = kParts; parts > 1; parts /= 2) x = neighbouring_parts<A>(x, x).sum();
  return x[0];
}
template <class A>
DINO_D2_INLINE A largest_lane(Vector<A> x) {
  for (unsigned lanes = kPartBytes / sizeof(A); lanes > 1; lanes /= 2) x = neighbours<A>(x, x).larger();
  for (int parts = kParts; parts > 1; parts /= 2) x = neighbouring_parts<A>(x, x).larger();
  return x[0];
}

// What exp needs of a floating point type. `shift` is 1.5 * 2^(bits of the mantissa): adding it rounds to an integer and
// leaves that in the low bits. ln 2 comes in two parts, the first with few bits, so that no digit of the rest is lost.
template <class A>
struct Exp;
template <>
struct Exp<float> {
  typedef uint32_t Bits __attribute__((vector_size(DINO_D2_VECTOR_BYTES)));
  static constexpr float shift = 12582912.0f, lowest = -87.0f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float terms[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
};
template <>
struct Exp<double> {
  typedef uint64_t Bits __attribute__((vector_size(DINO_D2_VECTOR_BYTES)));
  static constexpr double shift = 6755399441055744.0, lowest = -708.0, ln2_high = 0.693145751953125,
                          ln2_low = 1.4286068203094172e-6;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double terms[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                     1.0 / 40320,      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,
                                     1.0 / 6,          0.5,             1.0,            1.0};
};

// exp(x) for x <= 0, to the last bit or two: 2^n times a Taylor polynomial on [-ln 2 / 2, ln 2 / 2].
template <class A>
DINO_D2_INLINE Vector<A> exp_of_nonpositive(Vector<A> x) {
  using E = Exp<A>;
  const auto too_low = x < E::lowest;
  const Vector<A> clamped = too_low ? Vector<A>{} + E::lowest : x;
  const Vector<A> shifted = clamped * A(1.4426950408889634) + E::shift;
  const Vector<A> n = shifted - E::shift;
  const Vector<A> r = (clamped - n * E::ln2_high) - n * E::ln2_low;
  Vector<A> sum = Vector<A>{} + E::terms[0];
  for (unsigned i = 1; i < sizeof(E::terms) / sizeof(A); ++i) sum = sum * r + E::terms[i];
  const auto power = (reinterpret_cast<typename E::Bits>(shifted) + E::bias) << E::mantissa;
  return too_low ? Vector<A>{} : sum * reinterpret_cast<Vector<A>>(power);
}
