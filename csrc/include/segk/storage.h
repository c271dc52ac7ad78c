// Reads the dtype of an array once a call, not once an element.
#pragma once

#include "segk/dtype.h"

namespace segk {

// Floats whose dtype the compiler knows.
template <DType kDType>
struct Stored {
  static constexpr DType dtype = kDType;
  const void* data;

  SEGK_HD float operator[](int64_t i) const { return Floats{data, kDType}[i]; }
};

// Calls body(arrays...) with the arrays as Stored where all have one dtype, as they are where not.
template <class Body, class... Rest>
void with_storage(const Body& body, Floats first, Rest... rest) {
  if (!((rest.dtype == first.dtype) && ...)) return body(first, rest...);
  switch (first.dtype) {
    case DType::f32:
      return body(Stored<DType::f32>{first.data}, Stored<DType::f32>{rest.data}...);
    case DType::bf16:
      return body(Stored<DType::bf16>{first.data}, Stored<DType::bf16>{rest.data}...);
    case DType::f16:
      return body(Stored<DType::f16>{first.data}, Stored<DType::f16>{rest.data}...);
  }
}

}  // namespace segk
