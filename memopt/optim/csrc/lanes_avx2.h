/* Eight elements at a time. */

typedef float NAME(VF) __attribute__((vector_size(32)));
typedef int32_t NAME(VI) __attribute__((vector_size(32)));
#define VF NAME(VF)
#define VI NAME(VI)
#define LANES 8
#define LINES 1

static INLINE VI NAME(bits)(VF x) { return (VI)x; }
static INLINE VF NAME(as_float)(VI b) { return (VF)b; }
static INLINE VF NAME(all)(float x) { return (VF)_mm256_set1_ps(x); }
static INLINE VF NAME(load)(const float *p) { return (VF)_mm256_loadu_ps(p); }
static INLINE void NAME(store)(float *p, VF x) { _mm256_storeu_ps(p, (__m256)x); }
static INLINE VI NAME(load_u16)(const uint16_t *p) {
    return (VI)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
}
static INLINE void NAME(store_u16)(uint16_t *p, VI x) {
    __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
static INLINE VI NAME(load_u8)(const uint8_t *p) {
    return (VI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
}
static INLINE void NAME(store_u8)(uint8_t *p, VI x) {
    x = x & 0xff;
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(words, words));
}
static INLINE VI NAME(look_up)(const int32_t *table, VI index) {
    return (VI)_mm256_i32gather_epi32(table, (__m256i)index, 4);
}
static INLINE VF NAME(root)(VF x) { return (VF)_mm256_sqrt_ps((__m256)x); }
static INLINE VI NAME(larger)(VI a, VI b) { return (VI)_mm256_max_epi32((__m256i)a, (__m256i)b); }
static INLINE VI NAME(larger_unsigned)(VI a, VI b) { return (VI)_mm256_max_epu32((__m256i)a, (__m256i)b); }
static INLINE uint32_t NAME(largest_unsigned)(VI x) {
    __m128i y = _mm_max_epu32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(y, _mm_shuffle_epi32(y, 0xb1)));
}
static INLINE VI NAME(is_nan)(VF x) { return (VI)(x != x); }
static INLINE VI NAME(not_zero)(VF x) { return (VI)(x != NAME(all)(0.0f)); }

static INLINE VF NAME(table)(const float *p) { return NAME(load)(p); }
static INLINE VF NAME(at)(VF table, VI index) { return (VF)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index); }
static INLINE VF NAME(number)(VI x) { return (VF)_mm256_cvtepi32_ps((__m256i)x); }
static INLINE VF NAME(fused)(VF a, VF b, VF c) { return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static INLINE VF NAME(smaller)(VF a, VF b) { return (VF)_mm256_min_ps((__m256)a, (__m256)b); }
static INLINE VF NAME(greater)(VF a, VF b) { return (VF)_mm256_max_ps((__m256)a, (__m256)b); }
static INLINE VF NAME(greater_where)(VF which, VF a, VF b) {
    return NAME(greater)(a, (VF)((VI)b & (VI)(which != NAME(all)(0.0f))));
}
static INLINE VI NAME(add_one_where)(VI x, VF a, VF b) { return x - (VI)(a > b); }
static INLINE VF NAME(fused_where)(VI which, VF a, VF b, VF c) {
    return (VF)((VI)NAME(fused)(a, b, c) & (VI)(which != 0));
}
static INLINE void NAME(store_codes)(uint8_t *p, const VI *lines) {
    __m256i a = (__m256i)((lines[0] >> 14) & 0xff), b = (__m256i)((lines[1] >> 14) & 0xff);
    __m256i c = (__m256i)((lines[2] >> 14) & 0xff), d = (__m256i)((lines[3] >> 14) & 0xff);
    __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d)); /* by halves */
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)p, bytes);
}
typedef VI NAME(Sure);
static INLINE NAME(Sure) NAME(sure)(void) { return NAME(bits)(NAME(all)(1.0f)); }
static INLINE NAME(Sure) NAME(still_sure)(NAME(Sure) sure, VI x, int32_t bits) {
    return (VI)_mm256_min_epi32((__m256i)sure, (__m256i)(x & bits));
}
static INLINE int NAME(all_sure)(NAME(Sure) sure) { return _mm256_movemask_epi8((__m256i)(sure == 0)) == 0; }
static INLINE VI NAME(guess)(VI x) {
    __m256i above = _mm256_subs_epu16((__m256i)x, _mm256_set1_epi32(GUESS_FROM << 16));
    return (VI)_mm256_srli_epi32(_mm256_mulhi_epu16(above, _mm256_set1_epi32(GUESS_RATE << 16)), 16);
}
