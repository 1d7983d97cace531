#include "avx512.h"
// the level comes first
#include "linear.h"

extern "C" int dq_linear_avx512(const DqLinear* args) { return dq::run_linear(*args); }
