/* Where tensors lie: a caching allocator like torch's own, over cuMemAlloc of the stand-in driver. */

#include "accelerator.h"
#include "driver.h"

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>

namespace standin {
namespace {

constexpr size_t GRAIN = 512, SMALL = 1 << 20, SMALL_SEGMENT = 2 << 20, LARGE_SEGMENT = 20 << 20;

struct Block {
    size_t size;
    char *segment;
    bool used, small;
};

struct Pool {
    std::map<char *, Block> blocks;
    std::map<char *, size_t> segments;
    std::set<std::pair<size_t, char *>> unused[2];
    Stats stats = {};
};

Pool pools[MAX_DEVICES];
std::mutex mutex;
std::set<const void *> pinned;
thread_local int current = 0, allocate_on = -1;

char *new_segment(int device, size_t size) {
    InContext context(device);
    uint64_t pointer;
    if (driver().alloc(&pointer, size))
        return nullptr;
    Stats &s = pools[device].stats;
    s.reserved += size;
    s.reserved_peak = std::max(s.reserved_peak, s.reserved);
    return reinterpret_cast<char *>(pointer);
}

void give_back_unused(int device) {
    Pool &pool = pools[device];
    InContext context(device);
    for (auto segment = pool.segments.begin(); segment != pool.segments.end();) {
        auto [at, size] = *segment;
        Block &block = pool.blocks.at(at);
        if (block.used || block.size != size) {
            ++segment;
            continue;
        }
        pool.unused[block.small].erase({size, at});
        pool.blocks.erase(at);
        TORCH_CHECK(!driver().free(reinterpret_cast<uint64_t>(at)), "the stand-in driver does not know its own memory");
        pool.stats.reserved -= size;
        segment = pool.segments.erase(segment);
    }
}

void add_segment(int device, size_t size, bool small, size_t asked) {
    Pool &pool = pools[device];
    char *at = new_segment(device, size);
    if (!at) {
        give_back_unused(device);
        at = new_segment(device, size);
    }
    if (!at && size > asked) { /* a segment to share was too much: one for this alone */
        size = (asked + SMALL_SEGMENT - 1) / SMALL_SEGMENT * SMALL_SEGMENT;
        at = new_segment(device, size);
    }
    if (!at) {
        pool.stats.ooms++;
        size_t free, total;
        memory_of(device, &free, &total);
        TORCH_CHECK_WITH(OutOfMemoryError, false, "NPU out of memory. Tried to allocate ", asked, " bytes. Device ", device,
            " has a total capacity of ", total, " bytes of which ", free, " are free; this process has reserved ",
            pool.stats.reserved, ", ", pool.stats.allocated, " of them in tensors.");
    }
    pool.segments[at] = size;
    pool.blocks[at] = {size, at, false, small};
    pool.unused[small].insert({size, at});
}

void *take(int device, size_t nbytes) {
    std::lock_guard<std::mutex> lock(mutex);
    Pool &pool = pools[device];
    size_t size = (nbytes + GRAIN - 1) / GRAIN * GRAIN;
    bool small = size <= SMALL;
    auto found = pool.unused[small].lower_bound({size, nullptr});
    if (found == pool.unused[small].end()) {
        size_t rounded = (size + SMALL_SEGMENT - 1) / SMALL_SEGMENT * SMALL_SEGMENT;
        add_segment(device, small ? SMALL_SEGMENT : std::max(rounded, size < LARGE_SEGMENT / 2 ? LARGE_SEGMENT : 0), small, size);
        found = pool.unused[small].lower_bound({size, nullptr});
    }
    char *at = found->second;
    pool.unused[small].erase(found);
    Block &block = pool.blocks.at(at);
    size_t rest = block.size - size;
    if (rest >= (small ? GRAIN : SMALL)) {
        pool.blocks[at + size] = {rest, block.segment, false, small};
        pool.unused[small].insert({rest, at + size});
        block.size = size;
    }
    block.used = true;
    Stats &s = pool.stats;
    s.allocated += block.size, s.live++, s.allocations++;
    s.allocated_peak = std::max(s.allocated_peak, s.allocated);
    s.largest = std::max(s.largest, static_cast<int64_t>(nbytes));
    return at;
}

std::map<char *, Block>::iterator block_of(Pool &pool, const void *pointer) {
    auto at = const_cast<char *>(static_cast<const char *>(pointer));
    auto next = pool.blocks.upper_bound(at);
    if (next == pool.blocks.begin())
        return pool.blocks.end();
    auto found = std::prev(next);
    return at < found->first + found->second.size ? found : pool.blocks.end();
}

bool give_back(void *pointer) {
    std::lock_guard<std::mutex> lock(mutex);
    for (Pool &pool : pools) {
        auto found = block_of(pool, pointer);
        if (found == pool.blocks.end())
            continue;
        auto unused = [&](auto block) { return block->second.segment == found->second.segment && !block->second.used; };
        auto &lists = pool.unused[found->second.small];
        pool.stats.allocated -= found->second.size, pool.stats.live--;
        found->second.used = false;
        if (auto next = std::next(found); next != pool.blocks.end() && unused(next)) {
            lists.erase({next->second.size, next->first});
            found->second.size += next->second.size;
            pool.blocks.erase(next);
        }
        if (found != pool.blocks.begin() && unused(std::prev(found))) {
            auto before = std::prev(found);
            lists.erase({before->second.size, before->first});
            before->second.size += found->second.size;
            pool.blocks.erase(found);
            found = before;
        }
        lists.insert({found->second.size, found->first});
        return true;
    }
    return false;
}

void release(void *pointer) { give_back(pointer); }

struct Allocator : c10::Allocator {
    void copy_data(void *target, const void *source, size_t nbytes) const override { default_copy_data(target, source, nbytes); }
};

struct DeviceAllocator : Allocator {
    c10::DataPtr allocate(size_t nbytes) override {
        return standin::allocate(current, nbytes, {c10::kPrivateUse1, static_cast<c10::DeviceIndex>(current)});
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
};

c10::Allocator *const torchs = c10::GetCPUAllocator();

void release_any(void *pointer) {
    if (pointer && !give_back(pointer))
        torchs->raw_deleter()(pointer);
}

/* Takes the place of torch's CPU allocator, and is it for all that does not run under an AllocateOn. */
struct CpuAllocator : Allocator {
    c10::DataPtr allocate(size_t nbytes) override {
        return allocate_on < 0 ? torchs->allocate(nbytes) : standin::allocate(allocate_on, nbytes, c10::Device(c10::kCPU));
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release_any; } /* oneDNN frees by it */
};

void release_pinned(void *pointer) {
    std::lock_guard<std::mutex> lock(mutex);
    InContext context(0);
    pinned.erase(pointer);
    driver().host_free(pointer);
}

struct PinnedAllocator : Allocator {
    c10::DataPtr allocate(size_t nbytes) override {
        std::lock_guard<std::mutex> lock(mutex);
        InContext context(0);
        void *pointer = nullptr;
        TORCH_CHECK(!nbytes || !driver().host_alloc(&pointer, nbytes, 0), "no page-locked memory of ", nbytes, " bytes");
        if (pointer)
            pinned.insert(pointer);
        return {pointer, pointer, &release_pinned, c10::Device(c10::kCPU)};
    }
};

auto *on_devices = new DeviceAllocator; /* never destroyed: tensors may live longer */
auto *on_pinned = new PinnedAllocator;
REGISTER_ALLOCATOR(c10::kPrivateUse1, on_devices);
const bool replaced = (c10::SetCPUAllocator(new CpuAllocator, 255), true);

} // namespace

int device_count() { return driver().devices; }
int current_device() { return current; }
c10::Allocator *device_allocator() { return on_devices; }
c10::Allocator *pinned_allocator() { return on_pinned; }

void set_current_device(int device) {
    TORCH_CHECK(device >= 0 && device < device_count(), "there is no device npu:", device, ", only ", device_count());
    current = device;
}

c10::DataPtr allocate(int device, size_t nbytes, c10::Device seen_as) {
    TORCH_CHECK(device >= 0 && device < device_count(), "there is no device npu:", device, ", only ", device_count());
    void *pointer = nbytes ? take(device, nbytes) : nullptr;
    return {pointer, pointer, pointer ? &release : &c10::detail::deleteNothing, seen_as};
}

bool owns(int device, const void *pointer) {
    std::lock_guard<std::mutex> lock(mutex);
    return block_of(pools[device], pointer) != pools[device].blocks.end();
}

bool is_pinned(const void *pointer) {
    std::lock_guard<std::mutex> lock(mutex);
    return pinned.count(pointer);
}

Stats figures(int device) {
    std::lock_guard<std::mutex> lock(mutex);
    return pools[device].stats;
}

void begin_figures_anew(int device) {
    std::lock_guard<std::mutex> lock(mutex);
    Stats &s = pools[device].stats, now = {};
    now.allocated = now.allocated_peak = s.allocated;
    now.reserved = now.reserved_peak = s.reserved;
    now.live = s.live;
    s = now;
}

void copied(int device, bool to_device, int64_t nbytes) {
    std::lock_guard<std::mutex> lock(mutex);
    Stats &s = pools[device].stats;
    (to_device ? s.to_device : s.from_device)++;
    (to_device ? s.to_device_bytes : s.from_device_bytes) += nbytes;
    int64_t &largest = to_device ? s.to_device_largest : s.from_device_largest;
    largest = std::max(largest, nbytes);
}

void empty_cache() {
    std::lock_guard<std::mutex> lock(mutex);
    for (int device = 0; device < device_count(); device++)
        give_back_unused(device);
}

void memory_of(int device, size_t *free, size_t *total) {
    InContext context(device);
    driver().info(free, total);
}

AllocateOn::AllocateOn(int device) : before(allocate_on) { allocate_on = device; }
AllocateOn::~AllocateOn() { allocate_on = before; }

} // namespace standin
