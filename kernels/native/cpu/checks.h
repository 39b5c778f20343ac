// Checks of arguments that the ops share. Each returns 0, or the status to return.
#pragma once

#include <cstdint>
#include <new>

#include "error.h"
#include "loopfast.h"

namespace loopfast {

inline bool known(int32_t dtype) {
  return dtype == LOOPFAST_FLOAT32 || dtype == LOOPFAST_FLOAT16 || dtype == LOOPFAST_BFLOAT16;
}

inline int check_latents(const char *name, const void *data, int32_t dtype, bool optional) {
  if (data == nullptr) return optional ? 0 : invalid("%s is missing", name);
  return known(dtype) ? 0 : invalid("%s has the unknown dtype tag %d", name, dtype);
}

// Runs a body that may allocate.
template <class Body>
int guarded(Body &&body) {
  try {
    body();
    return 0;
  } catch (const std::bad_alloc &) {
    std::snprintf(error_message(), 256, "out of memory");
    return kOutOfMemory;
  }
}

}  // namespace loopfast
