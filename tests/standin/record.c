/* What was called, and what is to fail. Tests reach these functions with ctypes, or set LUNASHM_STANDIN_FAIL. */

#include "driver.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static struct failure {
    char symbol[64];
    int error, nth, before;
} failures[64];
static int failure_count;

static char *calls;
static size_t calls_length, calls_size;
static pid_t owner;

static void remember(const char *symbol)
{
    size_t length = strlen(symbol);
    if (calls_length + length + 2 > calls_size) {
        calls_size = 2 * calls_size + 4096;
        calls = realloc(calls, calls_size);
    }
    memcpy(calls + calls_length, symbol, length);
    calls_length += length;
    calls[calls_length++] = '\n';
    calls[calls_length] = 0;
}

static void plan(const char *symbol, int error, int nth, int before)
{
    if (failure_count == sizeof failures / sizeof *failures) {
        fprintf(stderr, "stand-in: too many failures are planned\n");
        abort();
    }
    struct failure *failure = &failures[failure_count++];
    snprintf(failure->symbol, sizeof failure->symbol, "%s", symbol);
    failure->error = error;
    failure->nth = nth;
    failure->before = before;
}

/* LUNASHM_STANDIN_FAIL="cuMemCreate=2:1,cuMemMap=801:3": error and which call of that name. */
__attribute__((constructor)) static void plan_from_environment(void)
{
    owner = getpid();
    const char *text = getenv("LUNASHM_STANDIN_FAIL");
    if (!text || !*text)
        return;
    char *copy = strdup(text), *rest = copy;
    for (char *entry; (entry = strsep(&rest, ","));) {
        char symbol[64];
        int error, nth;
        if (sscanf(entry, "%63[^=]=%d:%d", symbol, &error, &nth) != 3) {
            fprintf(stderr, "stand-in: LUNASHM_STANDIN_FAIL has no SYMBOL=ERROR:NTH in '%s'\n", entry);
            abort();
        }
        plan(symbol, error, nth, 0);
    }
    free(copy);
}

static struct failure *due(const char *symbol)
{
    struct failure *found = NULL;
    for (int i = 0; i < failure_count; i++)
        if (!strcmp(failures[i].symbol, symbol) && --failures[i].nth == 0)
            found = &failures[i];
    return found;
}

CUresult enter(const char *symbol, int needs, int *locked, CUresult *late)
{
    if (getpid() != owner) /* a forked child: CUDA is of no use there, and the lock may be somebody's */
        return NOT_INITIALIZED;
    pthread_mutex_lock(&mutex);
    *locked = 1;
    remember(symbol);
    struct failure *failure = due(symbol);
    if (failure && (failure->before || !(needs & RELEASES)))
        return failure->error;
    CUresult result = ready(needs);
    if (result == SUCCESS && failure)
        *late = failure->error;
    return result;
}

void leave(int *locked)
{
    if (*locked)
        pthread_mutex_unlock(&mutex);
}

/* -- for tests ------------------------------------------------------------------------------------------------------ */

/* The nth call of `symbol` from now fails with `error`; 1 is the next one. */
void standin_fail(const char *symbol, int error, int nth)
{
    plan(symbol, error, nth, 0);
}

void standin_refuse(const char *symbol, int error, int nth)
{
    plan(symbol, error, nth, 1);
}

/* The names of all calls so far, one a line. */
const char *standin_calls(void)
{
    return calls ? calls : "";
}

void standin_forget(void)
{
    calls_length = 0;
    failure_count = 0;
    if (calls)
        *calls = 0;
}

/* How many there are in this process of: allocations, imports, pinned; handles, reservations, mappings; contexts. */
int standin_live(const char *what)
{
    if (!strcmp(what, "contexts"))
        return count_contexts();
    int count = count_legacy(what);
    return count >= 0 ? count : count_vmm(what);
}

/* Bytes this process has made on the GPU at a place in the machine. */
size_t standin_used(int gpu)
{
    return used[gpu];
}

/* The place in the machine of the GPU that a pointer leads to, -1 for none. */
int standin_gpu(CUdeviceptr at)
{
    int gpu = -1;
    if (legacy_access(at, 1, &gpu) == UNKNOWN)
        vmm_access(at, 1, &gpu);
    return gpu;
}
