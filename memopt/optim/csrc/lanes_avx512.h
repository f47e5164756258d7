/* Sixteen elements at a time. */

typedef float NAME(VF) __attribute__((vector_size(64)));
typedef int32_t NAME(VI) __attribute__((vector_size(64)));
#define VF NAME(VF)
#define VI NAME(VI)
#define LANES 16
#define LINES 1

static INLINE VI NAME(bits)(VF x) { return (VI)x; }
static INLINE VF NAME(as_float)(VI b) { return (VF)b; }
static INLINE VF NAME(all)(float x) { return (VF)_mm512_set1_ps(x); }
static INLINE VF NAME(load)(const float *p) { return (VF)_mm512_loadu_ps(p); }
static INLINE void NAME(store)(float *p, VF x) { _mm512_storeu_ps(p, (__m512)x); }
static INLINE VI NAME(load_u16)(const uint16_t *p) {
    return (VI)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
}
static INLINE void NAME(store_u16)(uint16_t *p, VI x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)x));
}
static INLINE VI NAME(load_u8)(const uint8_t *p) {
    return (VI)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}
static INLINE void NAME(store_u8)(uint8_t *p, VI x) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)x));
}
static INLINE VI NAME(look_up)(const int32_t *table, VI index) {
    return (VI)_mm512_i32gather_epi32((__m512i)index, table, 4);
}
static INLINE VF NAME(root)(VF x) { return (VF)_mm512_sqrt_ps((__m512)x); }
static INLINE VI NAME(larger)(VI a, VI b) { return (VI)_mm512_max_epi32((__m512i)a, (__m512i)b); }
static INLINE VI NAME(larger_unsigned)(VI a, VI b) { return (VI)_mm512_max_epu32((__m512i)a, (__m512i)b); }
static INLINE uint32_t NAME(largest_unsigned)(VI x) { return _mm512_reduce_max_epu32((__m512i)x); }
static INLINE VI NAME(is_nan)(VF x) {
    return (VI)_mm512_movm_epi32(_mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q));
}
static INLINE VI NAME(not_zero)(VF x) {
    return (VI)_mm512_movm_epi32(_mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NEQ_UQ));
}

/* twice, as the index has four bits here and the fourth may be anything */
static INLINE VF NAME(table)(const float *p) { return (VF)_mm512_broadcast_f32x8(_mm256_loadu_ps(p)); }
static INLINE VF NAME(at)(VF table, VI index) { return (VF)_mm512_permutexvar_ps((__m512i)index, (__m512)table); }
static INLINE VF NAME(number)(VI x) { return (VF)_mm512_cvtepi32_ps((__m512i)x); }
static INLINE VF NAME(fused)(VF a, VF b, VF c) { return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static INLINE VF NAME(smaller)(VF a, VF b) { return (VF)_mm512_min_ps((__m512)a, (__m512)b); }
static INLINE VF NAME(greater)(VF a, VF b) { return (VF)_mm512_max_ps((__m512)a, (__m512)b); }
static INLINE VF NAME(greater_where)(VF which, VF a, VF b) {
    __mmask16 some = _mm512_cmp_ps_mask((__m512)which, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    return (VF)_mm512_mask_max_ps((__m512)a, some, (__m512)a, (__m512)b);
}
static INLINE VI NAME(add_one_where)(VI x, VF a, VF b) {
    __mmask16 above = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
    return (VI)_mm512_mask_add_epi32((__m512i)x, above, (__m512i)x, _mm512_set1_epi32(1));
}
static INLINE VF NAME(fused_where)(VI which, VF a, VF b, VF c) {
    __mmask16 some = _mm512_test_epi32_mask((__m512i)which, (__m512i)which);
    return (VF)_mm512_maskz_fmadd_ps(some, (__m512)a, (__m512)b, (__m512)c);
}
static INLINE void NAME(store_codes)(uint8_t *p, const VI *lines) {
    for (int i = 0; i < 4; i++) NAME(store_u8)(p + 16 * i, lines[i] >> 14);
}
typedef __mmask16 NAME(Sure);
static INLINE NAME(Sure) NAME(sure)(void) { return 0xffff; }
static INLINE NAME(Sure) NAME(still_sure)(NAME(Sure) sure, VI x, int32_t bits) {
    return _mm512_mask_test_epi32_mask(sure, (__m512i)x, _mm512_set1_epi32(bits));
}
static INLINE int NAME(all_sure)(NAME(Sure) sure) { return sure == 0xffff; }
static INLINE VI NAME(guess)(VI x) {
    __m512i above = _mm512_subs_epu16((__m512i)x, _mm512_set1_epi32(GUESS_FROM << 16));
    return (VI)_mm512_srli_epi32(_mm512_mulhi_epu16(above, _mm512_set1_epi32(GUESS_RATE << 16)), 16);
}
