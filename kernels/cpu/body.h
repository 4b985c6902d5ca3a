// The kernels' body. kernels.cc includes it once per instruction set, each in a
// namespace of its own; only the primitives in isa.h differ.

namespace TERNAX_ISA {

#include "isa.h"

#include "product.h"

#include "glue.h"

#include "digits.h"

#include "attention.h"

}  // namespace TERNAX_ISA
