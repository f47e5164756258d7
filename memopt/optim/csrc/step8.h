/* What Python hands to the 8-bit optimizer steps. memopt/optim/native.py holds the same layout. */
#ifndef MEMOPT_STEP8_H
#define MEMOPT_STEP8_H

#include <stdint.h>

/* Raised whenever a struct or the meaning of a field changes, so that an old library is noticed. */
enum { STEP8_VERSION = 1 };

enum { BLOCK = 256 };              /* elements that share a scale */
enum { SIGNED = 0, UNSIGNED = 1 }; /* the two dynamic maps, and the state each is for */

/* Rows of adjacent elements; the stride is from row to row, in elements. */
typedef struct {
    void *data;
    int64_t stride;
} Rows;

/* A tensor as rows x cols. A block is up to 256 neighbours in a row and has one scale per state. The blocks of all
 * tasks are numbered through. */
typedef struct {
    Rows weight, grad; /* float or bfloat16 */
    struct {
        Rows codes, scales; /* uint8, float */
    } states[2];            /* the second one is AdamW's only */
    int64_t rows, cols;
    int64_t first_block; /* how many blocks the tasks before this one have */
    float step_size;     /* AdamW: lr * sqrt(1 - beta2^step) / (1 - beta1^step); the others: lr */
    float eps;           /* AdamW: eps * sqrt(1 - beta2^step), so that the root of v needs no correction */
    int32_t weight_bf16, grad_bf16;
} Task;

/* One of the two dynamic maps, as memopt/optim/dynamic_map.py makes them: search_table, line_entries, lines. */
typedef struct {
    const int32_t *search;
    float entries[256];
    float first[8], step[8];
    float limit[8], slope[8], offset[8], top[8];
} Map;

/* What is common to all tasks. */
typedef struct {
    const Map *map[2];
    float beta[2];              /* SGD: the first is the momentum */
    float rest[2];              /* 1 - beta */
    float decay;                /* 1 - lr * weight_decay */
    float grad_scale;           /* gradients are multiplied by it first */
    float from_momentum, from_grad; /* SGD: the direction is from_momentum * momentum + from_grad * gradient */
} Settings;

/* Calls the function with the pointer on so many threads (fewer will do), the caller's included, and waits for them:
 * GOMP_parallel of the OpenMP library that torch has loaded. Its threads are awake after torch's work, and would keep
 * the processors from others for milliseconds. NULL: threads are made for the call. */
typedef void Parallel(void (*)(void *), void *, unsigned threads, unsigned flags);

/* One step of `count` tasks, which have `blocks` blocks together. `level` picks the instructions: 0 plain C, 1 AVX2, 2
 * AVX-512; no more than memopt_step8_level(). The bits are the same for any level and number of threads. */
typedef void Step(const Task *tasks, int64_t count, int64_t blocks, const Settings *settings, int32_t level,
                  int32_t threads, Parallel *parallel);
Step memopt_adamw8, memopt_lion8, memopt_sgd8;

int32_t memopt_step8_level(void);
int32_t memopt_step8_version(void);
int64_t memopt_step8_sizes(int32_t which); /* bytes of Task (0), Settings (1) and Map (2), for the tests */

#endif
