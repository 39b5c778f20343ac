// The kernels for this processor.
#pragma once

#include "kernels.h"

namespace loopfast {

const Kernels &kernels();

}  // namespace loopfast
