/* One element at a time, in plain C. */

typedef float NAME(VF);
typedef int32_t NAME(VI);
#define VF NAME(VF)
#define VI NAME(VI)
#define LANES 1
#define LINES 0

static INLINE VI NAME(bits)(VF x) { VI b; memcpy(&b, &x, sizeof b); return b; }
static INLINE VF NAME(as_float)(VI b) { VF x; memcpy(&x, &b, sizeof x); return x; }
static INLINE VF NAME(all)(float x) { return x; }
static INLINE VF NAME(load)(const float *p) { return *p; }
static INLINE void NAME(store)(float *p, VF x) { *p = x; }
static INLINE VI NAME(load_u16)(const uint16_t *p) { return *p; }
static INLINE void NAME(store_u16)(uint16_t *p, VI x) { *p = (uint16_t)x; }
static INLINE VI NAME(load_u8)(const uint8_t *p) { return *p; }
static INLINE void NAME(store_u8)(uint8_t *p, VI x) { *p = (uint8_t)x; }
static INLINE VI NAME(look_up)(const int32_t *table, VI index) { return table[index]; }
static INLINE VF NAME(root)(VF x) { return sqrtf(x); }
static INLINE VF NAME(fused)(VF a, VF b, VF c) { return fmaf(a, b, c); }
static INLINE VI NAME(larger)(VI a, VI b) { return a > b ? a : b; }
static INLINE VI NAME(larger_unsigned)(VI a, VI b) { return (uint32_t)a > (uint32_t)b ? a : b; }
static INLINE uint32_t NAME(largest_unsigned)(VI x) { return (uint32_t)x; }
static INLINE VI NAME(is_nan)(VF x) { return -(x != x); }
static INLINE VI NAME(not_zero)(VF x) { return -(x != 0.0f); }

typedef const float *NAME(Decoder);
static INLINE NAME(Decoder) NAME(decoder)(const Map *map) { return map->entries; }
