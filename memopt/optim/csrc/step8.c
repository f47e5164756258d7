/* Steps of AdamW, Lion and SGD with momentum whose states are 8-bit codes of the dynamic map, on the CPU.
 * The same bits whatever the instructions and the number of threads: build without contraction to fused operations. */
#include "step8.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define WITH_AVX 1
#include <immintrin.h>
#endif

#define SIGN ((int32_t)0x80000000u)
/* search_table in memopt/optim/dynamic_map.py */
enum { SEARCH_SHIFT = 16, SEARCH_FIRST = (127 - 23) << 7, SEARCH_LOW = 0xffff };
/* The upper half of a float's bits grows by 425 per decade, give or take 11. From 4e-7 on, 65536 / 154 of it at a time
 * reach 4e-6, 4e-5, ... 0.4: well above the largest magnitude of the decade below, well below that of the decade. */
enum { GUESS_FROM = 0x34d6, GUESS_RATE = 154 };
/* Vectors are taken in groups of 64 elements; the rest at the end of a row is done in a copy filled up with zeros. */
enum { GROUP = 64 };
/* Threads take shares of at least so many blocks, four each where there are enough: one that is held up delays less. */
enum { SHARE = 64, MAX_THREADS = 256 };

enum { ADAMW, LION, SGD, RULES };

/* Where one block of a task lies. */
typedef struct {
    void *weight;
    const void *grad;
    uint8_t *codes[2];
    float *scales[2];
} Block;

typedef struct {
    _Alignas(64) float weight[GROUP], grad[GROUP];
    uint8_t codes[2][GROUP];
} Rest;

typedef void BlockStep(const Block *at, int n, const Task *task, const Settings *settings);

static inline size_t number_bytes(int64_t count, int bf16) { return (size_t)count * (bf16 ? 2 : 4); }

static inline void *element(const void *p, int64_t i, int bf16) { return (char *)p + i * (bf16 ? 2 : 4); }

/* A copy of elements from..from + count - 1 of a block, and zeros after them. */
static inline Block take_rest(const Block *at, int from, int count, const Task *task, int states, Rest *into) {
    memset(into->weight, 0, sizeof into->weight);
    memset(into->grad, 0, sizeof into->grad);
    memcpy(into->weight, element(at->weight, from, task->weight_bf16), number_bytes(count, task->weight_bf16));
    memcpy(into->grad, element(at->grad, from, task->grad_bf16), number_bytes(count, task->grad_bf16));
    for (int s = 0; s < states; s++) {
        memset(into->codes[s], s == SIGNED ? 127 : 0, GROUP);
        memcpy(into->codes[s], at->codes[s] + from, (size_t)count);
    }
    return (Block){into->weight, into->grad, {into->codes[0], into->codes[1]}, {0}};
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Sets the scale of a state from the bits of the largest magnitude. False where that settles the codes, too: all are
 * below the normal numbers, or one is infinite or NaN. */
static inline int set_scale(uint32_t top, int which, int n, const Block *at) {
    const int usable = top >= 0x00800000 && top < 0x7f800000;
    if (usable) {
        memcpy(at->scales[which], &top, sizeof top);
    } else {
        *at->scales[which] = top < 0x00800000 ? 0.0f : NAN;
        memset(at->codes[which], which == SIGNED ? 127 : 0, (size_t)n);
    }
    return usable;
}

/* Asks for memory from element `from` on, a group of it; the numbers may lie behind the end of everything. */
static inline void ask_for(const void *p, int64_t from, int bytes_each) {
#if defined(__GNUC__)
    for (int byte = 0; byte < GROUP * bytes_each; byte += 64)
        __builtin_prefetch((const void *)((uintptr_t)p + (uintptr_t)(from * bytes_each + byte)));
#endif
}

#define NAME(name) name##_plain
#define TARGET
#define INLINE inline __attribute__((always_inline))
#include "lanes_plain.h"
#include "rules8.h"

#ifdef WITH_AVX
#define NAME(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define INLINE inline __attribute__((always_inline, target("avx2,fma")))
#include "lanes_avx2.h"
#include "rules8.h"

#define NAME(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE inline __attribute__((always_inline, target("avx512f,avx512bw,avx512dq,avx512vl")))
#include "lanes_avx512.h"
#include "rules8.h"
#endif

int32_t memopt_step8_level(void) {
#ifdef WITH_AVX
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

int32_t memopt_step8_version(void) { return STEP8_VERSION; }

int64_t memopt_step8_sizes(int32_t which) {
    return which == 0 ? sizeof(Task) : which == 1 ? sizeof(Settings) : sizeof(Map);
}

static BlockStep *pick(int rule, const Task *task, int32_t level) {
    const int w = task->weight_bf16 != 0, g = task->grad_bf16 != 0;
#ifdef WITH_AVX
    if (level == 2) return blocks_avx512[rule][w][g];
    if (level == 1) return blocks_avx2[rule][w][g];
#endif
    (void)level;
    return blocks_plain[rule][w][g];
}

static void step_task(int rule, const Task *task, int64_t begin, int64_t end, const Settings *set, int32_t level) {
    const int64_t per_row = (task->cols + BLOCK - 1) / BLOCK;
    const int states = rule == ADAMW ? 2 : 1;
    BlockStep *const step = pick(rule, task, level);
    int64_t row = begin / per_row, column = begin % per_row;
    for (int64_t i = begin; i < end; i++) {
        const int64_t offset = column * BLOCK, left = task->cols - offset;
        Block at = {
            element(task->weight.data, row * task->weight.stride + offset, task->weight_bf16),
            element(task->grad.data, row * task->grad.stride + offset, task->grad_bf16),
            {0},
            {0},
        };
        for (int s = 0; s < states; s++) {
            const Rows *codes = &task->states[s].codes, *scales = &task->states[s].scales;
            at.codes[s] = (uint8_t *)codes->data + row * codes->stride + offset;
            at.scales[s] = (float *)scales->data + row * scales->stride + column;
        }
        step(&at, left < BLOCK ? (int)left : BLOCK, task, set);
        if (++column == per_row) {
            column = 0;
            row++;
        }
    }
}

static void step_range(int rule, const Task *tasks, int64_t count, int64_t begin, int64_t end, const Settings *set,
                       int32_t level) {
    int64_t low = 0, high = count; /* the last task that starts at or before `begin` */
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (tasks[middle].first_block <= begin)
            low = middle;
        else
            high = middle;
    }
    for (; begin < end; low++) {
        const Task *task = tasks + low;
        const int64_t blocks = task->rows * ((task->cols + BLOCK - 1) / BLOCK);
        const int64_t from = begin - task->first_block, rest = end - task->first_block;
        const int64_t to = rest < blocks ? rest : blocks;
        if (from < to) step_task(rule, task, from, to, set, level);
        begin = task->first_block + to;
    }
}

/* A step being made: each thread takes the next share until none is left. */
typedef struct {
    int rule;
    const Task *tasks;
    int64_t count, blocks, shares;
    const Settings *settings;
    int32_t level;
    atomic_llong next;
} Job;

static void work(void *pointer) {
    Job *job = pointer;
    int64_t i;
    while ((i = atomic_fetch_add(&job->next, 1)) < job->shares)
        step_range(job->rule, job->tasks, job->count, job->blocks * i / job->shares,
                   job->blocks * (i + 1) / job->shares, job->settings, job->level);
}

static void *start(void *job) {
    work(job);
    return NULL;
}

static void work_together(Job *job, int threads) {
    pthread_t made[MAX_THREADS];
    int count = 0;
    while (count < threads - 1 && count < MAX_THREADS && pthread_create(&made[count], NULL, start, job) == 0) count++;
    work(job);
    while (count > 0) pthread_join(made[--count], NULL);
}

static void step_all(int rule, const Task *tasks, int64_t count, int64_t blocks, const Settings *settings,
                     int32_t level, int32_t threads, Parallel *parallel) {
    const int64_t most = (blocks + SHARE - 1) / SHARE;
    Job job = {rule, tasks, count, blocks, most < 4 * threads ? most : 4 * threads, settings, level, 0};
    threads = most < threads ? (int32_t)most : threads;
    if (threads <= 1)
        work(&job);
    else if (parallel != NULL)
        parallel(work, &job, (unsigned)threads, 0);
    else
        work_together(&job, threads);
}

void memopt_adamw8(const Task *tasks, int64_t count, int64_t blocks, const Settings *settings, int32_t level,
                   int32_t threads, Parallel *parallel) {
    step_all(ADAMW, tasks, count, blocks, settings, level, threads, parallel);
}

void memopt_lion8(const Task *tasks, int64_t count, int64_t blocks, const Settings *settings, int32_t level,
                  int32_t threads, Parallel *parallel) {
    step_all(LION, tasks, count, blocks, settings, level, threads, parallel);
}

void memopt_sgd8(const Task *tasks, int64_t count, int64_t blocks, const Settings *settings, int32_t level,
                 int32_t threads, Parallel *parallel) {
    step_all(SGD, tasks, count, blocks, settings, level, threads, parallel);
}
