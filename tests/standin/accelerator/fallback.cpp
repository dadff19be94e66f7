/* How a device computes: every operator's CPU kernel runs on the device's own memory, nothing is copied. */

#include "accelerator.h"

#include <ATen/core/Generator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <torch/library.h>

#include <unordered_map>

namespace standin {

using at::Tensor;
using c10::IValue;
using c10::Storage;

/* A storage on `device` over memory that `source` keeps. */
static Storage storage_over(const Storage &source, c10::Device device, c10::Allocator *allocator, bool keep) {
    auto drop = [](void *kept) { delete static_cast<Storage *>(kept); };
    void *at = const_cast<void *>(source.data());
    c10::DataPtr pointer = keep ? c10::DataPtr(at, new Storage(source), drop, device) : c10::DataPtr(at, device);
    return Storage(Storage::use_byte_size_t(), source.nbytes(), std::move(pointer), allocator, /*resizable=*/true);
}

static Tensor tensor_over(Storage storage, c10::DispatchKey key, const Tensor &like) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    return made;
}

/* One call: device tensors lent to a CPU kernel, and what it made of them. */
struct Call {
    const c10::OperatorHandle &op;
    int device = -1;
    bool indices_may_be_anywhere;
    std::vector<std::pair<Tensor, Tensor>> lent;              /* device's, CPU's */
    std::unordered_map<c10::StorageImpl *, Storage> on_cpu;   /* by the device's */
    std::unordered_map<c10::StorageImpl *, Storage> on_device; /* by the CPU's */
    std::vector<Tensor> others;

    explicit Call(const c10::OperatorHandle &op) : op(op) {
        const std::string &name = op.schema().name(); /* CUDA brings indices to the device by itself */
        indices_may_be_anywhere = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" ||
            name == "aten::index_put" || name == "aten::_unsafe_index" || name == "aten::_unsafe_index_put";
    }

    void settle(int index) {
        TORCH_CHECK(device < 0 || device == index, "Expected all tensors to be on the same device, but found at least two devices, npu:",
            device, " and npu:", index, "! (in ", op.schema().operator_name(), ")");
        device = index;
    }

    Tensor lend(const Tensor &tensor, bool written, bool index) {
        if (!tensor.defined())
            return tensor;
        if (!tensor.is_privateuseone()) {
            if (!(index && indices_may_be_anywhere) && (tensor.dim() || written))
                others.push_back(tensor);
            return tensor;
        }
        settle(tensor.device().index());
        for (auto &[theirs, ours] : lent)
            if (theirs.is_same(tensor))
                return ours;
        auto *key = tensor.storage().unsafeGetStorageImpl();
        auto found = on_cpu.find(key);
        if (found == on_cpu.end()) {
            found = on_cpu.emplace(key, storage_over(tensor.storage(), c10::Device(c10::kCPU), c10::GetAllocator(c10::kCPU), false)).first;
            on_device.emplace(found->second.unsafeGetStorageImpl(), tensor.storage());
        }
        lent.emplace_back(tensor, tensor_over(found->second, c10::DispatchKey::CPU, tensor));
        return lent.back().second;
    }

    IValue lend(const IValue &value, bool written) {
        if (value.isTensor())
            return lend(value.toTensor(), written, false);
        if (value.isTensorList()) {
            c10::List<Tensor> list;
            for (const Tensor &tensor : value.toTensorVector())
                list.push_back(lend(tensor, written, false));
            return list;
        }
        if (value.isOptionalTensorList()) {
            c10::List<std::optional<Tensor>> list;
            for (const std::optional<Tensor> &tensor : value.toOptionalTensorVector())
                list.push_back(tensor ? std::optional<Tensor>(lend(*tensor, written, true)) : std::nullopt);
            return list;
        }
        if (value.isDevice() && value.toDevice().is_privateuseone()) {
            settle(value.toDevice().has_index() ? value.toDevice().index() : current_device());
            return c10::Device(c10::kCPU);
        }
        return value.isGenerator() ? IValue(cpu_generator(value.toGenerator())) : value;
    }

    void refuse_mixture() {
        if (!others.empty() && !lent.empty())
            TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, npu:", device, " and ",
                others[0].device(), "! (in ", op.schema().operator_name(), ")");
    }

    /* What the kernel resized, or gave another shape. */
    void update_lent() {
        c10::Device npu(c10::kPrivateUse1, static_cast<c10::DeviceIndex>(device));
        for (auto &[key, ours] : on_cpu) {
            Storage theirs = on_device.at(ours.unsafeGetStorageImpl());
            if (ours.data() == theirs.data() && ours.nbytes() == theirs.nbytes())
                continue;
            Storage taken = storage_over(adopt(ours), npu, device_allocator(), true);
            theirs.set_data_ptr(std::move(taken.mutable_data_ptr()));
            theirs.set_nbytes(ours.nbytes());
        }
        for (auto &[theirs, ours] : lent)
            if (ours.sizes() != theirs.sizes() || ours.strides() != theirs.strides() || ours.storage_offset() != theirs.storage_offset())
                theirs.unsafeGetTensorImpl()->set_sizes_and_strides(ours.sizes(), ours.strides(), ours.storage_offset());
    }

    /* Memory that came from elsewhere (a kernel's own thread, say) becomes the device's. */
    Storage adopt(const Storage &made) {
        if (!made.data() || owns(device, made.data()))
            return made;
        c10::DataPtr pointer = allocate(device, made.nbytes(), c10::Device(c10::kCPU));
        std::memcpy(pointer.get(), made.data(), made.nbytes());
        return Storage(Storage::use_byte_size_t(), made.nbytes(), std::move(pointer), nullptr, false);
    }

    Tensor take(const Tensor &result) {
        if (!result.defined() || !result.is_cpu())
            return result;
        for (auto &[theirs, ours] : lent)
            if (ours.is_same(result))
                return theirs;
        auto *key = result.storage().unsafeGetStorageImpl();
        auto found = on_device.find(key);
        if (found == on_device.end()) {
            c10::Device npu(c10::kPrivateUse1, static_cast<c10::DeviceIndex>(device));
            found = on_device.emplace(key, storage_over(adopt(result.storage()), npu, device_allocator(), true)).first;
        }
        return tensor_over(found->second, c10::DispatchKey::PrivateUse1, result);
    }

    IValue take(const IValue &value) {
        if (value.isTensor())
            return take(value.toTensor());
        if (!value.isTensorList())
            return value;
        c10::List<Tensor> list;
        for (const Tensor &tensor : value.toTensorVector())
            list.push_back(take(tensor));
        return list;
    }
};

/* Runs `kernel`, an operator with the same arguments as `op`. */
static void run(const c10::OperatorHandle &op, const c10::OperatorHandle &kernel, torch::jit::Stack *stack) {
    Call call(op);
    const auto &arguments = op.schema().arguments();
    for (size_t i = 0; i < arguments.size(); i++) {
        IValue &value = (*stack)[stack->size() - arguments.size() + i];
        value = call.lend(value, arguments[i].alias_info() && arguments[i].alias_info()->isWrite());
    }
    call.refuse_mixture();
    {
        AllocateOn memory(call.device);
        kernel.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    }
    if (call.device < 0)
        return;
    call.update_lent();
    size_t results = op.schema().returns().size();
    for (size_t i = stack->size() - results; i < stack->size(); i++)
        (*stack)[i] = call.take((*stack)[i]);
}

void fallback(const c10::OperatorHandle &op, torch::jit::Stack *stack) { run(op, op, stack); }

/* torch asks other backends than its own for convolutions by this name. */
void convolution(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
    static auto kernel = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
    run(op, kernel, stack);
}

Tensor as_cpu(const Tensor &tensor) {
    if (!tensor.is_privateuseone())
        return tensor;
    Storage storage = storage_over(tensor.storage(), c10::Device(c10::kCPU), c10::GetAllocator(c10::kCPU), true);
    return tensor_over(std::move(storage), c10::DispatchKey::CPU, tensor);
}

} // namespace standin
