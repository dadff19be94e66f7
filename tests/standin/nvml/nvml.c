/* A stand-in for NVIDIA's libnvidia-ml.so.1: two GPUs, those of the stand-in driver. What is in use on them is said by
 * the environment, which is read anew at each call. Semantics follow NVIDIA's documentation of NVML.
 *
 *   LUNASHM_STANDIN_NVML_USED="0=5000000000,1=0"             bytes in use by GPU; 0 unless said
 *   LUNASHM_STANDIN_NVML_TOTAL="80000000000"                 bytes that each GPU has
 *   LUNASHM_STANDIN_NVML_PROCESSES="0:41=1000000,1:42=-1"    GPU:pid=bytes; -1: not available
 *   LUNASHM_STANDIN_NVML_FAIL="nvmlDeviceGetMemoryInfo=15"   every call of that name fails with that error
 */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int nvmlReturn_t;
typedef struct device {
    int gpu;
} *nvmlDevice_t;

typedef struct {
    unsigned long long total, free, used;
} nvmlMemory_t;

typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} nvmlProcessInfo_t;

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
};

enum { GPUS = 2 };
static struct device devices[GPUS] = {{0}, {1}};
static const char *uuids[GPUS] = {
    "GPU-aaaaaaaa-0000-4000-8000-000000000000",
    "GPU-bbbbbbbb-0000-4000-8000-000000000001",
};
static int users;

/* The value of `key` in a list "key=value,..." of the environment. */
static int said(const char *variable, const char *key, long long *value)
{
    size_t length = strlen(key);
    for (const char *at = getenv(variable); at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : "")
        if (!strncmp(at, key, length) && at[length] == '=') {
            *value = atoll(at + length + 1);
            return 1;
        }
    return 0;
}

static nvmlReturn_t failure(const char *symbol)
{
    long long error;
    return said("LUNASHM_STANDIN_NVML_FAIL", symbol, &error) ? (nvmlReturn_t)error : SUCCESS;
}

#define ENTER()                                                                                                         \
    do {                                                                                                                \
        nvmlReturn_t failed = failure(__func__);                                                                        \
        if (failed)                                                                                                     \
            return failed;                                                                                              \
        if (!users)                                                                                                     \
            return UNINITIALIZED;                                                                                       \
    } while (0)

nvmlReturn_t nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    nvmlReturn_t failed = failure(__func__);
    if (!failed)
        users++;
    return failed;
}

nvmlReturn_t nvmlShutdown(void)
{
    ENTER();
    users--;
    return SUCCESS;
}

const char *nvmlErrorString(nvmlReturn_t error)
{
    (void)error;
    return "an error of the stand-in";
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count)
{
    ENTER();
    *count = GPUS;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device)
{
    ENTER();
    if (index >= GPUS)
        return INVALID_ARGUMENT;
    *device = &devices[index];
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
    ENTER();
    for (int gpu = 0; gpu < GPUS; gpu++)
        if (!strcmp(uuids[gpu], uuid)) {
            *device = &devices[gpu];
            return SUCCESS;
        }
    return NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length)
{
    ENTER();
    snprintf(uuid, length, "%s", uuids[device->gpu]);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory)
{
    ENTER();
    const char *total = getenv("LUNASHM_STANDIN_NVML_TOTAL");
    char key[8];
    long long used = 0;
    snprintf(key, sizeof key, "%d", device->gpu);
    said("LUNASHM_STANDIN_NVML_USED", key, &used);
    memory->total = total ? strtoull(total, NULL, 10) : 80000000000ULL;
    memory->used = used;
    memory->free = memory->total - used;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *processes)
{
    ENTER();
    unsigned found = 0;
    const char *at = getenv("LUNASHM_STANDIN_NVML_PROCESSES");
    for (; at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : "") {
        int gpu;
        unsigned pid;
        long long used;
        if (sscanf(at, "%d:%u=%lld", &gpu, &pid, &used) != 3) {
            fprintf(stderr, "stand-in: LUNASHM_STANDIN_NVML_PROCESSES has no GPU:PID=BYTES in '%s'\n", at);
            abort();
        }
        if (gpu != device->gpu)
            continue;
        if (found < *count && processes)
            processes[found] = (nvmlProcessInfo_t){pid, (unsigned long long)used, 0, 0};
        found++;
    }
    nvmlReturn_t result = found > *count ? INSUFFICIENT_SIZE : SUCCESS;
    *count = found;
    return result;
}
