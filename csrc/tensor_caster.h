// Conversion of torch tensors for pybind11 without torch: they are borrowed by DLPack's C exchange API (0.1 us per
// tensor).
#pragma once
#include <pybind11/pybind11.h>

#include "tensor.h"

namespace flashpo {

// torch.Tensor and its table of exchange functions, looked up once at import.
struct TorchExchange {
  PyObject* tensor_type = nullptr;
  const DLPackExchangeAPI* api = nullptr;

  static TorchExchange& instance() {
    static TorchExchange exchange;
    return exchange;
  }
  void load() {
    pybind11::object type = pybind11::module_::import("torch").attr("Tensor");
    pybind11::object capsule = pybind11::getattr(type, "__dlpack_c_exchange_api__", pybind11::none());
    if (capsule.is_none()) throw pybind11::import_error("flashpo._C needs torch >= 2.10 (no DLPack exchange API)");
    api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw pybind11::error_already_set();
    if (api->header.version.major != DLPACK_MAJOR_VERSION) throw pybind11::import_error("flashpo._C: unknown DLPack");
    tensor_type = type.release().ptr();
  }
};

}  // namespace flashpo

namespace pybind11::detail {

template <>
struct type_caster<flashpo::Tensor> {
  PYBIND11_TYPE_CASTER(flashpo::Tensor, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    auto& torch = flashpo::TorchExchange::instance();
    // Raised here, because pybind11's own TypeError prints every argument, including the values of tensors.
    if (!PyObject_TypeCheck(source.ptr(), reinterpret_cast<PyTypeObject*>(torch.tensor_type)))
      throw pybind11::type_error("expected a torch.Tensor or None");
    if (torch.api->dltensor_from_py_object_no_sync(source.ptr(), &value.dl) != 0) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail
