/* The operators that are a backend's own: making tensors, other views of the same storage, copies between devices. */

#include "accelerator.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <Python.h>

namespace standin {

using at::Tensor;
using at::IntArrayRef;

void fallback(const c10::OperatorHandle &op, torch::jit::Stack *stack);
void convolution(const c10::OperatorHandle &op, torch::jit::Stack *stack);
Tensor as_cpu(const Tensor &tensor);

namespace {

const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
    c10::OptionalDeviceGuard guard(device);
    return at::detail::empty_generic(size, device_allocator(), KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device> device, std::optional<bool>) {
    c10::OptionalDeviceGuard guard(device);
    return at::detail::empty_strided_generic(size, stride, device_allocator(), KEYS, c10::dtype_or_default(dtype));
}

Tensor as_strided(const Tensor &self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
    return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

Tensor &set_storage_offset(Tensor &self, at::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
    return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

Tensor &set_storage(Tensor &self, at::Storage source) {
    auto count = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
    return at::native::set_storage_cpu_(self, std::move(source), 0, {count}, {});
}

Tensor copy_from(const Tensor &self, const Tensor &target, bool) {
    auto nbytes = static_cast<int64_t>(self.nbytes());
    if (target.is_privateuseone() && target.device() != self.device())
        copied(target.device().index(), true, nbytes);
    if (self.is_privateuseone() && target.device() != self.device())
        copied(self.device().index(), false, nbytes);
    as_cpu(target).copy_(as_cpu(self));
    return target;
}

Tensor copy_from_and_resize(const Tensor &self, const Tensor &target) {
    target.resize_(self.sizes());
    return copy_from(self, target, false);
}

at::Scalar local_scalar(const Tensor &self) { return as_cpu(self).item(); }

void record_stream(Tensor &, c10::Stream) {}

/* A tensor over memory that is nobody's but `owner`'s: a Python object, kept until the storage is gone. */
Tensor tensor_at(int64_t pointer, int64_t nbytes, int64_t device, int64_t owner) {
    auto release = [](void *object) {
        if (!Py_IsInitialized())
            return;
        PyGILState_STATE state = PyGILState_Ensure();
        Py_DECREF(static_cast<PyObject *>(object));
        PyGILState_Release(state);
    };
    auto *object = reinterpret_cast<PyObject *>(owner);
    PyGILState_STATE state = PyGILState_Ensure();
    Py_INCREF(object);
    PyGILState_Release(state);
    c10::Device npu(c10::kPrivateUse1, static_cast<c10::DeviceIndex>(device));
    c10::DataPtr data(reinterpret_cast<void *>(pointer), object, release, npu);
    c10::Storage storage(c10::Storage::use_byte_size_t(), nbytes, std::move(data), nullptr, false);
    auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), KEYS, caffe2::TypeMeta::Make<uint8_t>());
    made.unsafeGetTensorImpl()->set_sizes_contiguous({nbytes});
    return made;
}

} // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("as_strided", as_strided);
    m.impl("view", at::native::view);
    m.impl("_reshape_alias", at::native::_reshape_alias);
    m.impl("set_.source_Storage_storage_offset", set_storage_offset);
    m.impl("set_.source_Storage", set_storage);
    m.impl("set_.source_Tensor", at::native::set_tensor_);
    m.impl("_copy_from", copy_from);
    m.impl("_copy_from_and_resize", copy_from_and_resize);
    m.impl("_local_scalar_dense", local_scalar);
    m.impl("record_stream", record_stream);
    m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY(lunashm_standin, m) {
    m.def("tensor_at(int pointer, int nbytes, int device, int owner) -> Tensor", tensor_at);
}

} // namespace standin
