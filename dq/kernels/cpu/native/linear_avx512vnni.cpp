#define DQ_WITHOUT_BF16
#include "avx512.h"
// the level comes first
#include "linear.h"

extern "C" int dq_linear_avx512vnni(const DqLinear* args) { return dq::run_linear(*args); }
