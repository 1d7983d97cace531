#include "avx2.h"
// the level comes first
#include "linear.h"

extern "C" int dq_linear_avx2(const DqLinear* args) { return dq::run_linear(*args); }
