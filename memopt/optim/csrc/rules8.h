/* One block of one tensor: states decoded, weights updated, states encoded; nothing larger than a block is held.
 * The formulas are those of memopt/optim/rules.py and memopt/optim/dynamic_map.py. Products and sums are fused where it
 * is written so and nowhere else.
 *
 * Included once per set of lanes (lanes_*.h), which define LANES elements of float (VF) and int32 (VI) and
 *   all                        the same number in every lane
 *   bits, as_float             reinterpret
 *   load, store, *_u8, *_u16   from and to memory, anywhere; the lowest byte or half of each lane
 *   look_up                    in a table in memory
 *   root, fused(a, b, c)       square root; a * b + c rounded once
 *   larger, larger_unsigned    of two integers
 *   largest_unsigned           lane
 *   is_nan, not_zero           all ones where it holds
 * and, where LINES is 1,
 *   table, at                  8 floats in a register, looked up by the lowest three bits of an integer
 *   number                     integer to float
 *   smaller, greater           of two floats
 *   greater_where(w, a, b)     the greater of two positive floats where w is not 0, else a
 *   fused_where(w, a, b, c)    a * b + c where w is not 0, else 0
 *   add_one_where(x, a, b)     x + 1 where a > b, else x
 *   guess                      max(0, upper half - GUESS_FROM) * GUESS_RATE >> 16
 *   sure, still_sure, all_sure whether x & bits was not 0 in any lane of any x so far
 *   store_codes                bits 14 to 21 of each lane of four vectors, as bytes
 */

static INLINE VF NAME(load_number)(const void *p, int i, int bf16) {
    return bf16 ? NAME(as_float)(NAME(load_u16)((const uint16_t *)p + i) << 16) : NAME(load)((const float *)p + i);
}

/* To bfloat16 it rounds to nearest, half to even. */
static INLINE void NAME(store_number)(void *p, int i, VF x, int bf16) {
    if (bf16) {
        VI raw = NAME(bits)(x);
        VI rounded = ((raw + 0x7fff + ((raw >> 16) & 1)) >> 16) & 0xffff;
        VI nan = NAME(is_nan)(x);
        NAME(store_u16)((uint16_t *)p + i, (rounded & ~nan) | (nan & 0x7fc0));
    } else {
        NAME(store)((float *)p + i, x);
    }
}

static INLINE VI NAME(magnitude)(VF x) { return NAME(bits)(x) & ~SIGN; }

/* 1, -1, or 0 for zeros */
static INLINE VF NAME(sign)(VF x) {
    VI one = (NAME(bits)(x) & SIGN) | 0x3f800000;
    return NAME(as_float)(one & NAME(not_zero)(x));
}

/* The code of the nearest entry to x, in [-1, 1], by the search table; 1 at least in the unsigned map where x > 0. */
static INLINE VI NAME(search)(VF x, const Map *map, int which) {
    VI raw = NAME(magnitude)(x), zero = raw ^ raw;
    VI bin = NAME(larger)((raw >> SEARCH_SHIFT) - SEARCH_FIRST, zero);
    VI index = (NAME(look_up)(map->search, bin) + (raw & SEARCH_LOW)) >> SEARCH_SHIFT;
    VI sign = NAME(bits)(x) >> 31;
    return NAME(larger)(which == SIGNED ? 127 + ((index ^ sign) - sign) : index,
                        which == SIGNED ? zero : NAME(not_zero)(x) & 1);
}

#if LINES
typedef struct { VF first, step; } NAME(Decoder);
typedef struct { VF limit, slope, offset, top; } NAME(Encoder);

static INLINE NAME(Decoder) NAME(decoder)(const Map *map) {
    return (NAME(Decoder)){NAME(table)(map->first), NAME(table)(map->step)};
}

/* What codes stand for, before the scale. The index of a magnitude, written as a float, has the decade as its exponent;
 * without the leading bit it counts the equal steps in the decade. */
static INLINE VF NAME(decode)(VI code, int which, const NAME(Decoder) *by) {
    VI index = which == SIGNED ? code - 127 : code;
    VI number = NAME(bits)(NAME(number)(which == SIGNED ? index : index + 1));
    VI raw = which == SIGNED ? number & ~SIGN : number;
    VI decade = raw >> 23;
    VF count = NAME(as_float)(raw) - NAME(as_float)(raw & 0x7f800000);
    VF size = NAME(fused_where)(index, NAME(at)(by->step, decade), count, NAME(at)(by->first, decade));
    return which == SIGNED ? NAME(as_float)(NAME(bits)(size) | (number & SIGN)) : size;
}

/* The bits of a float between 512 and 768 whose whole part is 512 more than the code of x: the code is in bits 14 to 21
 * and the fraction below. Within a decade the index of a magnitude is a line, nothing is looked up in memory. */
static INLINE VI NAME(line)(VF x, int which, const NAME(Encoder) *by) {
    VF size = which == SIGNED ? NAME(as_float)(NAME(magnitude)(x)) : x;
    VI decade = NAME(guess)(NAME(bits)(size)); /* or the one below it */
    decade = NAME(add_one_where)(decade, size, NAME(at)(by->limit, decade));
    VF line = NAME(fused)(NAME(at)(by->slope, decade), size, NAME(at)(by->offset, decade));
    line = NAME(smaller)(line, NAME(at)(by->top, decade));
    if (which == SIGNED) {
        line = NAME(as_float)(NAME(bits)(line) ^ (NAME(bits)(x) & SIGN));
        line = NAME(greater)(line + 639.5f, NAME(all)(512.5f));
    } else {
        line = NAME(greater_where)(x, line, NAME(all)(513.5f));
    }
    return NAME(bits)(line);
}

/* Codes of `count` numbers, a multiple of GROUP. */
static INLINE void NAME(encode)(const float *x, int count, float inverse, const Map *map, int which, uint8_t *codes) {
    const NAME(Encoder) by = {NAME(table)(map->limit), NAME(table)(map->slope), NAME(table)(map->offset),
                              NAME(table)(map->top)};
    for (int i = 0; i < count; i += 4 * LANES) {
        NAME(Sure) sure = NAME(sure)();
        VI line[4];
        for (int j = 0; j < 4; j++) {
            line[j] = NAME(line)(NAME(load)(x + i + j * LANES) * inverse, which, &by);
            /* 0 within 2^-13 of a whole number, which is more than rounding errors can be: one element in 4096 */
            sure = NAME(still_sure)(sure, line[j] + 2, 0x3ffc);
        }
        NAME(store_codes)(codes + i, line);
        if (!NAME(all_sure)(sure))
            for (int j = i; j < i + 4 * LANES; j += LANES)
                NAME(store_u8)(codes + j, NAME(search)(NAME(load)(x + j) * inverse, map, which));
    }
}
#else
static INLINE VF NAME(decode)(VI code, int which, const NAME(Decoder) *by) {
    (void)which;
    return (*by)[code];
}

static INLINE void NAME(encode)(const float *x, int count, float inverse, const Map *map, int which, uint8_t *codes) {
    for (int i = 0; i < count; i += LANES)
        NAME(store_u8)(codes + i, NAME(search)(NAME(load)(x + i) * inverse, map, which));
}
#endif

/* What an update works with: numbers of the task, and what it leaves behind of the block. */
typedef struct {
    Settings s;
    float step_size, eps, scale[2];
    NAME(Decoder) by[2];
    VI top[2]; /* largest magnitudes so far, as bits: by these integers order as floats do, NaN last */
} NAME(Work);

/* `count` elements, a multiple of GROUP: weights are updated, new states left in `momentum` and `square`. */
static INLINE void NAME(update)(const Block *at, int count, NAME(Work) *work, int rule, int weight_bf16, int grad_bf16,
                                float *momentum, float *square) {
    const Block b = *at; /* a copy: for all the compiler knows, storing weights could change the original */
    const Settings s = work->s;
    for (int i = 0; i < count; i += LANES) {
        if (i % GROUP == 0) { /* the computing keeps the processor from looking so far ahead */
            ask_for(b.weight, i + 2 * BLOCK, weight_bf16 ? 2 : 4);
            ask_for(b.grad, i + 2 * BLOCK, grad_bf16 ? 2 : 4);
            for (int which = 0; which < (rule == ADAMW ? 2 : 1); which++) ask_for(b.codes[which], i + 2 * BLOCK, 1);
        }
        VF weight = NAME(load_number)(b.weight, i, weight_bf16) * s.decay;
        VF grad = NAME(load_number)(b.grad, i, grad_bf16) * s.grad_scale;
        VF m = NAME(decode)(NAME(load_u8)(b.codes[0] + i), SIGNED, &work->by[0]) * work->scale[0];
        VF direction;
        if (rule == ADAMW) {
            VF v = NAME(decode)(NAME(load_u8)(b.codes[1] + i), UNSIGNED, &work->by[1]) * work->scale[1];
            m = NAME(fused)(grad - m, NAME(all)(s.rest[0]), m);
            v = NAME(fused)(v, NAME(all)(s.beta[1]), grad * grad * s.rest[1]);
            direction = m / (NAME(root)(v) + work->eps);
            work->top[1] = NAME(larger_unsigned)(work->top[1], NAME(bits)(v));
            NAME(store)(square + i, v);
        } else if (rule == LION) {
            direction = NAME(sign)(NAME(fused)(grad - m, NAME(all)(s.rest[0]), m));
            m = NAME(fused)(grad - m, NAME(all)(s.rest[1]), m);
        } else {
            m = NAME(fused)(m, NAME(all)(s.beta[0]), grad);
            direction = NAME(fused)(m, NAME(all)(s.from_momentum), grad * s.from_grad);
        }
        work->top[0] = NAME(larger_unsigned)(work->top[0], NAME(magnitude)(m));
        NAME(store)(momentum + i, m);
        NAME(store_number)(b.weight, i, NAME(fused)(direction, NAME(all)(-work->step_size), weight), weight_bf16);
    }
}

/* The codes of a whole block, of which the last `rest` do not fill a group. */
static INLINE void NAME(encode_all)(const float *x, int n, float inverse, const Map *map, int which, uint8_t *codes) {
    const int rest = n % GROUP, direct = n - rest;
    NAME(encode)(x, direct, inverse, map, which, codes);
    if (rest) {
        uint8_t last[GROUP];
        NAME(encode)(x + direct, GROUP, inverse, map, which, last);
        memcpy(codes + direct, last, (size_t)rest);
    }
}

static INLINE void NAME(block)(const Block *at, int n, const Task *task, const Settings *settings, int rule,
                               int weight_bf16, int grad_bf16) {
    _Alignas(64) float momentum[BLOCK];
    _Alignas(64) float square[BLOCK];
    const int states = rule == ADAMW ? 2 : 1, rest = n % GROUP, direct = n - rest;
    const VI none = NAME(bits)(NAME(all)(0.0f));
    NAME(Work) work = {*settings, task->step_size, task->eps, {*at->scales[0], rule == ADAMW ? *at->scales[1] : 0.0f},
                       {NAME(decoder)(settings->map[0]), NAME(decoder)(settings->map[1])}, {none, none}};
    NAME(update)(at, direct, &work, rule, weight_bf16, grad_bf16, momentum, square);
    if (rest) {
        Rest copy;
        const Block last = take_rest(at, direct, rest, task, states, &copy);
        NAME(update)(&last, GROUP, &work, rule, weight_bf16, grad_bf16, momentum + direct, square + direct);
        memcpy(element(at->weight, direct, weight_bf16), copy.weight, number_bytes(rest, weight_bf16));
    }
    /* both divisions first: they wait for the last elements, so let them wait together */
    const uint32_t top1 = NAME(largest_unsigned)(work.top[0]);
    const uint32_t top2 = NAME(largest_unsigned)(work.top[1]) & ~(uint32_t)SIGN; /* v >= 0, but a NaN may have a sign */
    const float inverse1 = 1.0f / float_of(top1), inverse2 = 1.0f / float_of(top2);
    if (set_scale(top1, SIGNED, n, at))
        NAME(encode_all)(momentum, n, inverse1, settings->map[0], SIGNED, at->codes[0]);
    if (rule == ADAMW && set_scale(top2, UNSIGNED, n, at))
        NAME(encode_all)(square, n, inverse2, settings->map[1], UNSIGNED, at->codes[1]);
}

#define ONE(rule, w, g)                                                                                    \
    static TARGET void NAME(block_##rule##w##g)(const Block *at, int n, const Task *task, const Settings *s) { \
        NAME(block)(at, n, task, s, rule, w, g);                                                           \
    }
#define ALL(rule) ONE(rule, 0, 0) ONE(rule, 0, 1) ONE(rule, 1, 0) ONE(rule, 1, 1)
ALL(ADAMW)
ALL(LION)
ALL(SGD)
#define LISTED(rule) \
    {{NAME(block_##rule##00), NAME(block_##rule##01)}, {NAME(block_##rule##10), NAME(block_##rule##11)}}
/* [rule][weights are bfloat16][gradients are bfloat16] */
static BlockStep *const NAME(blocks)[RULES][2][2] = {LISTED(ADAMW), LISTED(LION), LISTED(SGD)};

#undef LISTED
#undef ALL
#undef ONE
#undef LINES
#undef LANES
#undef VF
#undef VI
#undef NAME
#undef INLINE
#undef TARGET
