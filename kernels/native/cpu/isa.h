// The kernels for this processor.
#pragma once

#include "kernels.h"
#include "norm_kernels.h"

namespace loopfast {

const Kernels &kernels();
const NormKernels &norm_kernels();

}  // namespace loopfast
