/* What other processes hold of the GPUs' memory, in a file that all of them name: LUNASHM_STANDIN_LEDGER. Without it each
 * process has GPUs to itself. Bytes count for who made them and end with that process, even where another one still maps
 * them: on a GPU they would be in use until that ends, too. */

#include "driver.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

#define SLOTS 64

/* A process holds the lock of the byte of its slot's number, which the kernel drops when it ends, however it does. */
static struct slot {
    size_t used[MAX_GPUS];
} *slots;
static int file = -1, mine;

static int locked_by_another(int slot)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = slot, .l_len = 1};
    return !fcntl(file, F_OFD_GETLK, &lock) && lock.l_type != F_UNLCK;
}

static int claim(int slot)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = slot, .l_len = 1};
    return !fcntl(file, F_OFD_SETLK, &lock);
}

static int opened(void)
{
    const char *path = getenv("LUNASHM_STANDIN_LEDGER");
    if (slots || !path || !*path)
        return slots != NULL;
    file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    size_t size = SLOTS * sizeof *slots;
    void *at = file < 0 || ftruncate(file, size) ? MAP_FAILED : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (at != MAP_FAILED)
        for (mine = 0; mine < SLOTS; mine++)
            if (claim(mine)) {
                slots = at;
                slots[mine] = (struct slot){{0}};
                return 1;
            }
    fprintf(stderr, "stand-in: no place in the ledger %s\n", path);
    abort();
}

/* Nobody else makes or gives back memory until `settle`. */
size_t others_hold(int gpu)
{
    size_t sum = 0;
    if (!opened())
        return 0;
    flock(file, LOCK_EX);
    for (int slot = 0; slot < SLOTS; slot++)
        if (slot != mine && slots[slot].used[gpu] && locked_by_another(slot))
            sum += slots[slot].used[gpu];
    return sum;
}

void settle(int gpu)
{
    if (!opened())
        return;
    slots[mine].used[gpu] = used[gpu];
    flock(file, LOCK_UN);
}
