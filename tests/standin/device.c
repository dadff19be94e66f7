/* GPUs, CUDA_VISIBLE_DEVICES, contexts, and how others find the functions. */

#include "driver.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    unsigned char bytes[16];
} CUuuid;

static int initialised;
static int shown[MAX_GPUS], shown_count; /* ordinal -> physical */
static struct context contexts[MAX_GPUS];
static __thread CUcontext stack[64];
static __thread int depth;

static int machine_gpus(void)
{
    const char *text = getenv("LUNASHM_STANDIN_DEVICES");
    int count = text ? atoi(text) : 2;
    return count < 0 ? 0 : count > MAX_GPUS ? MAX_GPUS : count;
}

size_t memory_size(void)
{
    const char *text = getenv("LUNASHM_STANDIN_MEMORY");
    return text ? strtoull(text, NULL, 10) : (size_t)1 << 30;
}

int attribute(int id)
{
    for (const char *at = getenv("LUNASHM_STANDIN_ATTRIBUTES"); at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : "") {
        int key, value;
        if (sscanf(at, "%d=%d", &key, &value) == 2 && key == id)
            return value;
    }
    switch (id) {
    case 16: return 132; /* multiprocessors */
    case 41:             /* unified addressing */
    case 102:            /* virtual memory management */
    case 103:            /* ... with file descriptors */
    case 125: return 1;  /* IPC events */
    case 75: return 9;   /* compute capability */
    default: return 0;   /* 20: compute mode, default */
    }
}

static CUuuid uuid_of(int gpu)
{
    CUuuid uuid = {{0}};
    memset(uuid.bytes, 0xAA + 0x11 * gpu, 4);
    uuid.bytes[6] = 0x40;
    uuid.bytes[8] = 0x80;
    uuid.bytes[15] = gpu;
    return uuid;
}

static void spell(int gpu, char text[48])
{
    const unsigned char *b = uuid_of(gpu).bytes;
    int length = sprintf(text, "GPU-");
    for (int i = 0; i < 16; i++)
        length += sprintf(text + length, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", b[i]);
}

/* One entry of CUDA_VISIBLE_DEVICES: an ordinal, or a UUID, which may be cut short if it stays unique. -1: neither. */
static int named(const char *entry)
{
    int found = -1, count = machine_gpus();
    if (isdigit((unsigned char)*entry)) {
        char *end;
        long ordinal = strtol(entry, &end, 10);
        return *end || ordinal >= count ? -1 : (int)ordinal;
    }
    if (strlen(entry) <= 4 || strncmp(entry, "GPU-", 4))
        return -1;
    for (int gpu = 0; gpu < count; gpu++) {
        char text[48];
        spell(gpu, text);
        if (!strncasecmp(text, entry, strlen(entry))) {
            if (found >= 0)
                return -1;
            found = gpu;
        }
    }
    return found;
}

static void look(void)
{
    const char *text = getenv("CUDA_VISIBLE_DEVICES");
    shown_count = 0;
    if (!text) {
        for (; shown_count < machine_gpus(); shown_count++)
            shown[shown_count] = shown_count;
        return;
    }
    char *copy = strdup(text), *rest = copy;
    for (char *entry; (entry = strsep(&rest, ","));) {
        entry += strspn(entry, " ");
        int gpu = named(entry);
        if (gpu < 0 || visible(gpu) >= 0) /* all after the first one that makes no sense are ignored */
            break;
        shown[shown_count++] = gpu;
    }
    free(copy);
}

int physical(CUdevice device)
{
    return device >= 0 && device < shown_count ? shown[device] : -1;
}

CUdevice visible(int gpu)
{
    for (int i = 0; i < shown_count; i++)
        if (shown[i] == gpu)
            return i;
    return -1;
}

CUcontext current(void)
{
    return depth ? stack[depth - 1] : NULL;
}

CUresult ready(int needs)
{
    if ((needs & (INITIALISED | IN_CONTEXT)) && !initialised)
        return NOT_INITIALIZED;
    if ((needs & IN_CONTEXT) && (!current() || !current()->references))
        return INVALID_CONTEXT;
    return SUCCESS;
}

int count_contexts(void)
{
    int count = 0;
    for (int gpu = 0; gpu < MAX_GPUS; gpu++)
        count += contexts[gpu].references;
    return count;
}

CUresult cuInit(unsigned flags)
{
    ENTER("cuInit", ANYTIME);
    if (flags)
        return INVALID_VALUE;
    if (!initialised)
        look();
    if (!shown_count)
        return NO_DEVICE;
    initialised = 1;
    return SUCCESS;
}

CUresult cuDriverGetVersion(int *version)
{
    ENTER("cuDriverGetVersion", ANYTIME);
    *version = 13000;
    return SUCCESS;
}

CUresult cuDeviceGetCount(int *count)
{
    ENTER("cuDeviceGetCount", INITIALISED);
    *count = shown_count;
    return SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    ENTER("cuDeviceGet", INITIALISED);
    *device = ordinal;
    return physical(ordinal) < 0 ? INVALID_DEVICE : SUCCESS;
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device)
{
    ENTER("cuDeviceGetName", INITIALISED);
    if (physical(device) < 0)
        return INVALID_DEVICE;
    const char *text = getenv("LUNASHM_STANDIN_NAME");
    snprintf(name, length, "%s %d", text ? text : "Stand-in GPU", physical(device));
    return SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device)
{
    ENTER("cuDeviceGetUuid", INITIALISED);
    if (physical(device) < 0)
        return INVALID_DEVICE;
    *uuid = uuid_of(physical(device));
    return SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device)
{
    ENTER("cuDeviceTotalMem", INITIALISED);
    *bytes = memory_size();
    return physical(device) < 0 ? INVALID_DEVICE : SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, int id, CUdevice device)
{
    ENTER("cuDeviceGetAttribute", INITIALISED);
    if (physical(device) < 0)
        return INVALID_DEVICE;
    *value = attribute(id);
    return SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    ENTER("cuDevicePrimaryCtxRetain", INITIALISED);
    int gpu = physical(device);
    if (gpu < 0)
        return INVALID_DEVICE;
    contexts[gpu].gpu = gpu;
    contexts[gpu].references++;
    *context = &contexts[gpu];
    return SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device)
{
    ENTER("cuDevicePrimaryCtxRelease", INITIALISED | RELEASES);
    int gpu = physical(device);
    if (gpu < 0)
        return INVALID_DEVICE;
    if (!contexts[gpu].references)
        return INVALID_CONTEXT;
    if (!--contexts[gpu].references)
        forget_context_memory(gpu);
    RELEASED();
}

CUresult cuCtxPushCurrent_v2(CUcontext context)
{
    ENTER("cuCtxPushCurrent", INITIALISED);
    if (!context || !context->references)
        return INVALID_CONTEXT;
    if (depth == sizeof stack / sizeof *stack)
        return INVALID_VALUE;
    stack[depth++] = context;
    return SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext *context)
{
    ENTER("cuCtxPopCurrent", INITIALISED | RELEASES);
    if (!depth)
        return INVALID_CONTEXT;
    depth--;
    if (context)
        *context = stack[depth];
    RELEASED();
}

CUresult cuCtxSetCurrent(CUcontext context)
{
    ENTER("cuCtxSetCurrent", INITIALISED);
    if (depth)
        depth--;
    if (context)
        stack[depth++] = context;
    return SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context)
{
    ENTER("cuCtxGetCurrent", INITIALISED);
    *context = current();
    return SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device)
{
    ENTER("cuCtxGetDevice", IN_CONTEXT);
    *device = visible(current()->gpu);
    return SUCCESS;
}

CUresult cuCtxSynchronize(void)
{
    ENTER("cuCtxSynchronize", IN_CONTEXT);
    return SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(int *mode)
{
    ENTER("cuThreadExchangeStreamCaptureMode", INITIALISED);
    static __thread int now; /* 0: global */
    if (*mode < 0 || *mode > 2)
        return INVALID_VALUE;
    int before = now;
    now = *mode;
    *mode = before;
    return SUCCESS;
}
